"""The private interfaces of Triton that the strict interpreter builds on, as they are in Triton 3.6 to 3.9."""

import importlib
import inspect

import triton

RELEASES = ("3.6", "3.7", "3.8", "3.9")
_BUILDER = "triton.runtime.interpreter:InterpreterBuilder"
_CAST = ("self src dst_type",)
_BINARY = ("self lhs rhs",)
# module:attribute -> the parameters that it may have, or () if it isn't a function. What the strict interpreter replaces must
# be called as before, and what it calls must take what it gives.
PINS = {
    f"{_BUILDER}.set_grid_idx": ("self x y z",),
    f"{_BUILDER}.set_grid_dim": ("self nx ny nz",),
    f"{_BUILDER}.create_load": ("self ptr cache_policy is_volatile", "self ptr _0 _1 is_volatile"),
    f"{_BUILDER}.create_store": ("self ptr val cache_policy", "self ptr val _0 _1"),
    f"{_BUILDER}.create_masked_load": (
        "self ptrs mask other cache_policy is_volatile", "self ptrs mask other cache_modifier eviction_policy is_volatile",
    ),
    f"{_BUILDER}.create_masked_store": (
        "self ptrs value mask cache_policy", "self ptrs value mask cache_modifier eviction_policy",
    ),
    f"{_BUILDER}.create_atomic_rmw": ("self rmwOp ptr val mask sem scope",),
    f"{_BUILDER}.create_atomic_cas": ("self ptr cmp val sem scope",),
    f"{_BUILDER}.create_barrier": ("self",),
    f"{_BUILDER}.create_assert": ("self condition message",),
    f"{_BUILDER}.cast_impl": _CAST,
    f"{_BUILDER}.create_int_cast": ("self src dst_type is_signed",),
    f"{_BUILDER}.create_fp_to_fp": ("self src dst_type rounding_mode",),
    **{f"{_BUILDER}.create_{kind}": _CAST for kind in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc")},
    f"{_BUILDER}.create_dot": ("self a b d input_precision max_num_imprecise_acc",),
    f"{_BUILDER}.create_clampf": ("self arg lo hi propagate_nans",),
    f"{_BUILDER}.create_fma": ("self x y z",),
    **{f"{_BUILDER}.create_{kind}": _BINARY for kind in ("maxnumf", "minnumf", "idiv", "sdiv", "udiv", "srem", "urem")},
    f"{_BUILDER}.binary_op": ("self lhs rhs op",),
    f"{_BUILDER}.ternary_op": ("self lhs rhs other op",),
    "triton.runtime.interpreter:TensorHandle.__init__": ("self data dtype attr",),
    "triton.runtime.interpreter:TensorHandle.get_element_ty": ("self",),
    "triton.runtime.interpreter:GridExecutor.__init__": ("self fn arg_names grid pre_run_hooks",),
    "triton.runtime.interpreter:GridExecutor.__call__": ("self args_dev kwargs",),
    "triton.runtime.interpreter:GridExecutor._init_args_hst": ("self args_dev kwargs",),
    "triton.runtime.interpreter:GridExecutor._restore_args_dev": ("self args_dev args_hst kwargs kwargs_hst",),
    "triton.runtime.interpreter:ReduceOps.sum": ("self input",),
    "triton.runtime.interpreter:ReduceOps.min_max": ("self input val_reduce_op idx_reduce_op",),
    "triton.runtime.interpreter:ScanOps.cumsum": ("self input",),
    "triton.runtime.interpreter:ReduceScanOpInterface.to_tensor": ("self ret dtype",),
    "triton.runtime.interpreter:ASTTransformer.generic_visit": ("self node",),
    "triton.runtime.interpreter:FunctionRewriter._compile_and_exec": ("self transformed_ast",),
    "triton.runtime.interpreter:_get_np_dtype": ("tt_dtype",),
    "triton.runtime.interpreter:_implicit_cvt": ("arg",),
    "triton.runtime.interpreter:_patch_lang": ("fn",),
    "triton.runtime.interpreter:_patch_attr": ("obj name member builder scope",),
    "triton.runtime.interpreter:interpreter_semantic": (),
    "triton.runtime.interpreter:_LangPatchScope.__init__": ("self",),
    "triton.runtime.interpreter:_patch_lang_core": ("lang scope",),
    "triton.runtime.interpreter:_patch_lang_tensor": ("tensor scope",),
    "triton.runtime.interpreter:_interpreter.load": (),
    "triton.runtime.interpreter:_interpreter.store": (),
    "triton.runtime.interpreter:_ir.ROUNDING_MODE.RTNE": (),
    "triton.runtime.interpreter:_ir.PROPAGATE_NAN.NONE": (),
    "triton.runtime.interpreter:interpreter_builder.codegen_fns": (),
    "triton.runtime.interpreter:interpreter_builder.options.debug": (),
    "triton.runtime.interpreter:interpreter_builder.options.sanitize_overflow": (),
    "triton.language.semantic:TritonSemantic.binary_op_sanitize_overflow_impl": ("self lhs rhs binary_op",),
    "triton.language.semantic:TritonSemantic.broadcast_impl_value": ("self lhs rhs",),
    "triton.language.core:block_type.__init__": ("self element_ty shape",),
    "triton.language.core:block_type.to_ir": ("self builder",),
    "triton.language.core:tensor.__init__": ("self handle type",),
    "triton.language.core:dtype.__eq__": ("self other",),
    "triton.language.core:_unwrap_if_constexpr": ("o",),
    "triton.language.semantic:TritonSemantic.device_assert": ("self cond msg mask",),
    "triton.language.extra.libdevice:tanh": ("arg0",),
    "triton.language.extra.libdevice:erf": ("arg0",),
    "triton.backends.nvidia.compiler:min_dot_size": ("target",),
    "triton.backends.driver:DriverBase.get_benchmarker": ("self",),
    "triton.runtime:driver.set_active": ("driver",),
    "triton.tools.tensor_descriptor:TensorDescriptor.__init__": (
        "self base shape strides block_shape padding round_f32_to_tf32", "self base shape strides block_shape padding",
    ),
    "triton.runtime.jit:KernelInterface.__getitem__": ("self grid",),
    "triton.runtime.autotuner:Autotuner.do_bench": (),
}  # fmt: skip
# What the strict interpreter adds; a Triton that has it already would have to be looked at.
ABSENT = (
    "triton.runtime.interpreter:ASTTransformer.visit_For", "triton.runtime.interpreter:_strict_range",
    "triton.language.core:dtype.sizes", "triton.language.core:block_type.__getattr__",
)  # fmt: skip
_MISSING = object()


def _find(pin):
    module, _, path = pin.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return _MISSING
    for name in path.split("."):
        found = getattr(found, name, _MISSING)
    return found


def moved() -> list[str]:
    """What this Triton does otherwise: one line for each interface. To be called before ``install``."""
    lines = []
    if ".".join(triton.__version__.split(".")[:2]) not in RELEASES:
        lines.append(f"Triton must be one of {', '.join(RELEASES)}, got {triton.__version__}")
    for pin, allowed in PINS.items():
        found = _find(pin)
        if found is _MISSING:
            lines.append(f"{pin} is missing in Triton {triton.__version__}")
        elif allowed:
            parameters = " ".join(inspect.signature(found).parameters)
            if parameters not in allowed:
                lines.append(f"{pin} must take ({' or '.join(allowed)}), got ({parameters}) in Triton {triton.__version__}")
    lines += [f"{pin} is new in Triton {triton.__version__}" for pin in ABSENT if _find(pin) is not _MISSING]
    return lines
