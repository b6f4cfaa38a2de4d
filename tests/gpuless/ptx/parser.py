"""Text of a PTX kernel -> instructions with resolved operands."""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Fault(AssertionError):
    """The kernel does what no GPU would forgive: a race, a missing wait, an access out of bounds."""


class Refused(NotImplementedError):
    """The simulator doesn't know this piece of PTX, and doesn't guess."""


class Register(NamedTuple):
    index: int
    bits: int  # 1 for a predicate


class Immediate(NamedTuple):
    text: str


class Special(NamedTuple):
    name: str  # %tid.x and its like


class Symbol(NamedTuple):
    space: str  # "shared" or "param"
    offset: int


class Vector(NamedTuple):
    items: tuple


class Pair(NamedTuple):
    value: object  # a|p: a result and a predicate
    predicate: object


class Negated(NamedTuple):
    predicate: object


class Address(NamedTuple):
    base: object
    offset: int


class Label(NamedTuple):
    name: str


DISCARD = "_"


@dataclass
class Instruction:
    text: str
    name: str
    modifiers: tuple
    operands: tuple
    number: int  # among those of its kernel
    guard: object = None  # Register or Negated


@dataclass
class Kernel:
    name: str
    parameters: tuple  # (bytes, offset) of each
    parameter_bytes: int
    shared_bytes: int  # static shared memory; dynamic memory follows
    widths: list  # bits of each register
    instructions: list
    labels: dict  # label -> index of an instruction
    threads: int | None  # of a block: required, or at most
    exact_threads: bool


WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32,
          "b64": 64, "u64": 64, "s64": 64, "f64": 64}  # fmt: skip
ENTRY = r"\.entry\s+(%s)\s*\("
STATEMENT = re.compile(r"\s*(?:([{}])|([$\w]+):(?!:)|([^;]*);)")
IMMEDIATE = re.compile(r"-?\d+U?|-?0[xX][0-9a-fA-F]+U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
DYNAMIC_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]\s*;")


def entries(ptx: str) -> list[str]:
    """Names of the kernels in a module."""
    return re.findall(ENTRY % r"[\w$]+", ptx)


def bracketed(text: str, start: int, pair: str) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for match in re.finditer(rf"[{re.escape(pair)}]", text[start:]):
        depth += 1 if match[0] == pair[0] else -1
        if depth == 0:
            return start + match.start()
    raise Refused("the PTX ends within brackets")


def split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts] if text.strip() else []


def immediate_integer(text: str) -> int:
    if not IMMEDIATE.fullmatch(text) or text[:2] in ("0f", "0F", "0d", "0D"):
        raise Refused(f"{text!r} is not an integer")
    return int(text.removesuffix("U"), 0)


class Parser:
    """One kernel of a module."""

    def __init__(self, ptx: str, name: str | None = None):
        self.dynamic = DYNAMIC_SHARED.findall(ptx)
        entry = re.compile(ENTRY % (re.escape(name) if name else r"[\w$]+"))
        found = entry.search(ptx)
        if not found:
            raise Refused(f"the PTX has no kernel {name}")
        another = ptx.find(".entry", found.end()) % (len(ptx) + 1)
        ptx = re.sub(r"(?m)//[^\n]*|^\s*\.(?:loc|file)\s[^\n]*$", "", ptx[found.start() : another])
        found = entry.search(ptx)
        self.name, self.symbols, self.scopes, self.widths = found[1], {}, [{}], []
        self.instructions, self.labels, self.shared_bytes = [], {}, 0
        end = bracketed(ptx, found.end() - 1, "()")
        self.parameters = self.read_parameters(ptx[found.end() : end])
        body = ptx.index("{", end)
        self.read_directives(ptx[end + 1 : body])
        self.read_body(ptx[body + 1 : bracketed(ptx, body, "{}")])

    def kernel(self) -> Kernel:
        return Kernel(
            self.name, self.parameters, self.parameter_bytes, self.shared_bytes, self.widths, self.instructions, self.labels,
            self.threads, self.exact_threads,
        )  # fmt: skip

    def read_parameters(self, text):
        parameters, offset = [], 0
        for part in split(text):
            scalar = re.fullmatch(r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)", part)
            block = re.fullmatch(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", part)
            if scalar:
                size = align = WIDTHS[scalar[1]] // 8
                name = scalar[2]
            elif block:
                align, name, size = int(block[1]), block[2], int(block[3])
            else:
                raise Refused(f"parameter {part!r}")
            offset = -(-offset // align) * align
            self.symbols[name] = Symbol("param", offset)
            parameters.append((size, offset))
            offset += size
        self.parameter_bytes = offset
        return tuple(parameters)

    def read_directives(self, text):
        self.threads, self.exact_threads = None, False
        for name, values in re.findall(r"\.(\w+)\s+([\d, ]+)", text):
            if name in ("reqntid", "maxntid"):
                sizes = [int(v) for v in values.split(",")]
                self.threads, self.exact_threads = sizes[0], name == "reqntid"
                if any(size != 1 for size in sizes[1:]):
                    raise Refused(f"a block of {sizes}")
            elif name not in ("minnctapersm", "maxnreg"):
                raise Refused(f"directive .{name}")

    def read_body(self, text):
        """Statements end with a semicolon; a brace where a statement could begin opens or closes a scope of registers."""
        position = 0
        while match := STATEMENT.match(text, position):
            brace, label, statement = match.groups()
            if brace:
                self.scopes.append({}) if brace == "{" else self.scopes.pop()
            elif label:
                self.labels[label] = len(self.instructions)
            elif statement.strip():
                self.read_statement(" ".join(statement.split()))
            position = match.end()
        if text[position:].strip():
            raise Refused(f"statement {text[position:].strip()[:80]!r}")
        # Static shared memory comes first, so the address of the dynamic memory is known only now.
        for name in self.dynamic:
            self.symbols[name] = Symbol("shared", -(-self.shared_bytes // 128) * 128)
        self.shared_bytes = -(-self.shared_bytes // 128) * 128
        for instruction, operands in self.instructions:
            instruction.operands = tuple(self.operand(text, scopes) for text, scopes in operands)
        self.instructions = [instruction for instruction, _ in self.instructions]

    def read_statement(self, text):
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
            for name in split(names):
                self.declare(name, WIDTHS[kind])
        elif shared := re.fullmatch(r"\.shared \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", text):
            start = -(-self.shared_bytes // int(shared[1])) * int(shared[1])
            self.symbols[shared[2]] = Symbol("shared", start)
            self.shared_bytes = start + int(shared[3])
        elif text.startswith("."):
            if not re.fullmatch(r'\.pragma "(nounroll|used_bytes_mask (0x\w+|\d+))"', text):  # advice to ptxas
                raise Refused(text)
        else:
            guard = re.match(r"@(!?)(%[\w$]+)\s+", text)
            rest = text[guard.end() :] if guard else text
            opcode, _, operands = rest.partition(" ")
            name, *modifiers = opcode.split(".")
            instruction = Instruction(text, name, tuple(modifiers), (), len(self.instructions))
            if guard:
                register = self.operand(guard[2], self.scopes)
                if not isinstance(register, Register) or register.bits != 1:
                    raise Refused(text)
                instruction.guard = Negated(register) if guard[1] else register
            scopes = list(self.scopes)
            self.instructions.append((instruction, [(part, scopes) for part in split(operands)]))

    def declare(self, name, bits):
        numbered = re.fullmatch(r"(.*)<(\d+)>", name)
        for n in [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [name]:
            self.scopes[-1][n] = Register(len(self.widths), bits)
            self.widths.append(bits)

    def operand(self, text, scopes):
        for scope in reversed(scopes):
            if text in scope:
                return scope[text]
        if text == DISCARD:
            return DISCARD
        if text.startswith("{") and text.endswith("}"):
            return Vector(tuple(self.operand(part, scopes) for part in split(text[1:-1])))
        if text.startswith("[") and text.endswith("]"):
            base, plus, offset = (part.strip() for part in text[1:-1].partition("+"))
            return Address(self.operand(base, scopes), immediate_integer(offset) if plus else 0)
        if text.startswith("!"):
            return Negated(self.operand(text[1:], scopes))
        if "|" in text:
            return Pair(*(self.operand(part.strip(), scopes) for part in text.split("|")))
        if text in self.symbols:
            return self.symbols[text]
        if re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid", text):
            return Special(text)
        if IMMEDIATE.fullmatch(text):
            return Immediate(text.removesuffix("U"))
        if text in self.labels:
            return Label(text)
        raise Refused(f"operand {text!r}")


def parse(ptx: str, name: str | None = None) -> Kernel:
    """The kernel ``name`` of a module, or its first one."""
    return Parser(ptx, name).kernel()
