"""What Triton's front end works out anew for every operation, kept: types of one shape, and its own functions patched to run
in the interpreter. It takes most of the time of a kernel, and no check lies in it that the first time doesn't make."""

import functools

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patched = set()  # modules of the language, by id, that the running launch has patched


def _install_types():
    """Blocks of one shape share it, and what Triton derives from it; ``sizes`` says of every type which one that is."""
    stock_block, stock_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
    stock_broadcast, stock_equal, stock_unwrap = (
        TritonSemantic.broadcast_impl_value, tl.core.dtype.__eq__, tl.core._unwrap_if_constexpr
    )  # fmt: skip
    plain = {int, float, bool, str, type(None), tl.core.dtype, tl.core.block_type, tl.core.pointer_type, tl.core.tensor}
    known, blocks, tensors = {}, {}, {}  # id of a shape in ``blocks`` -> sizes; sizes -> what else a type, or a tensor, has

    def block(self, element_ty, shape):
        if (sizes := known.get(id(shape))) is None:
            sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if (kept := blocks.get(sizes)) is None or {*map(type, sizes)} != {int}:
            stock_block(self, element_ty, shape)
            kept = {n: v for n, v in vars(self).items() if n not in ("element_ty", "name")} | {"sizes": sizes}
            kept = blocks.setdefault(sizes, kept)
            known[id(kept["shape"])] = sizes
        self.__dict__.update(kept, element_ty=element_ty)

    def name(self, attribute):
        if attribute != "name":
            raise AttributeError(attribute)
        return f"<{self.shape}, {self.element_ty}>"

    def tensor(self, handle, type):
        if (kept := tensors.get(type.sizes)) is None:
            stock_tensor(self, handle, type)
            tensors[type.sizes] = {"shape": self.shape, "numel": self.numel}
        else:
            self.__dict__.update(kept, handle=handle, type=type, dtype=type.scalar)

    def spread(self, value, sizes):
        if value.type.sizes == sizes:
            return value
        ty = tl.block_type(value.type.scalar, [*sizes])
        if value.type.sizes:
            return self.make_tensor(self.builder.create_broadcast(value.handle, sizes), ty)
        return self.make_tensor(self.builder.create_splat(ty, value.handle), ty)

    def broadcast(self, left, right):
        a, b = left.type.sizes, right.type.sizes
        if a and b and (len(a) != len(b) or any(m != n and m != 1 != n for m, n in zip(a, b))):
            return stock_broadcast(self, left, right)
        sizes = a if a == b or not b else b if not a else tuple([n if m == 1 else m for m, n in zip(a, b)])
        return spread(self, left, sizes), spread(self, right, sizes)

    def equal(self, other):
        return self is other or stock_equal(self, other)

    def unwrap(value):
        return value if type(value) in plain else stock_unwrap(value)

    tl.core.dtype.sizes, tl.core.dtype.__eq__, tl.core._unwrap_if_constexpr = (), equal, unwrap
    tl.core.block_type.__init__, tl.core.block_type.__getattr__, tl.core.tensor.__init__ = block, name, tensor
    tl.core.block_type.to_ir = lambda self, builder: self  # the interpreter's builder makes an equal one
    TritonSemantic.broadcast_impl_value = broadcast


def _install_functions():
    """The stock interpreter patches the language anew at every call of a device function, and copies the keywords of every call
    of a function of the language."""
    stock = interpreter._patch_lang
    semantic, wrapper = interpreter.interpreter_semantic, tl.core.arange.__code__

    @functools.cache
    def modules(fn):
        return {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}

    def patch_lang(fn):
        if modules(fn) <= _patched:
            return interpreter._LangPatchScope()
        _patched.update(modules(fn))
        return stock(fn)

    def patch_attr(obj, name, member, builder, scope):
        inner = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member  # that asks for _semantic

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_lang, interpreter._patch_attr = patch_lang, patch_attr


def begin_launch():
    _patched.clear()


def install():
    _install_types()
    _install_functions()
