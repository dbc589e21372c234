"""What one device does in a compiled step, counted from the text of its optimised HLO.

XLA's own cost analysis takes the body of a loop once and a Pallas kernel as nothing; here a loop counts as often as it
runs and a kernel as the cost estimate that it carries.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

from audiolm_jax.flops import valid_places

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# What moves no data by itself.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "copy-done", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type, dimensions, and whether it lies in the device's main memory (rather than on the chip)."""

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool

    @property
    def num_bytes(self) -> int:
        """By the number of bits in the type's name: none in tokens, and a byte for "pred"."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits.group()) if bits else 8 * (self.dtype == "pred")) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      arrays: of the result, those of a tuple one after the other.
      operands: names.
      literal: what stands in the parentheses; of a constant its value, of a parameter its number.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern found in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device in one step.

    Attributes:
      flops: of matrix products, convolutions and kernels.
      memory_bytes: read from and written to its main memory.
      collective_bytes: that it sends to other devices, by the ring algorithms.
    """

    flops: float = 0.0
    memory_bytes: float = 0.0
    collective_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(times * value for value in dataclasses.astuple(self)))


def program_cost(text: str) -> Cost:
    """Cost of a module, given as `jax.stages.Compiled.as_text` prints it.

    Raises:
      ValueError: a loop whose number of rounds cannot be read off.
    """
    module = _Module(text)
    return module.cost(module.entry)


def _balanced(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed again."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced parentheses: {text[start : start + 80]}")


def _parse(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%(\S+) = ", line)
    if head is None:
        return None
    type_start = head.end()
    type_end = _balanced(line, type_start) + 1 if line[type_start] == "(" else line.index(" ", type_start)
    opcode = re.compile(r" ([\w\-]+)\(").match(line, type_end)
    if opcode is None:
        return None
    operands_end = _balanced(line, opcode.end() - 1)
    arrays = [
        Array(
            dtype, tuple(int(size) for size in shape.split(",") if size), re.search(r"S\([1-9]", layout or "") is None
        )
        for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", line[type_start:type_end])
    ]
    literal = line[opcode.end() : operands_end]
    operands = tuple(re.findall(r"%([^\s,()]+)", literal))
    attributes, is_root = line[operands_end + 1 :], bool(head.group(1))
    return Instruction(head.group(2), opcode.group(1), tuple(arrays), operands, literal, attributes, is_root)


class _Module:
    """The computations of a module, by name, and the costs worked out so far."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.num_partitions = int((re.search(r"num_partitions=(\d+)", text) or [0, 1])[1])
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
            if header:
                current = self.computations[header.group(2)] = {}
                self.entry = header.group(2) if header.group(1) else getattr(self, "entry", header.group(2))
            elif instruction := _parse(line):
                current[instruction.name] = instruction
        self.cost = functools.cache(self._cost)

    def _cost(self, name: str, fused: bool = False) -> Cost:
        computation = self.computations[name]
        total = Cost()
        for instruction in computation.values():
            total += self._instruction_cost(instruction, computation)
            if not fused:
                total += Cost(memory_bytes=sum(self._traffic(instruction, computation)))
        return total

    def _instruction_cost(self, instruction: Instruction, computation: dict[str, Instruction]) -> Cost:
        opcode = instruction.opcode
        match opcode:
            case "dot":
                return Cost(flops=_dot_flops(instruction, computation))
            case "convolution":
                return Cost(flops=_convolution_flops(instruction, computation))
            case "custom-call":
                return _kernel_cost(instruction)
            case "while":
                body, condition = self._called(instruction, r"body=%([^\s,]+)"), self._condition(instruction)
                return (self.cost(body) + self.cost(condition)) * self._rounds(instruction, computation)
            case "conditional":
                costs = [self.cost(branch) for branch in self._branches(instruction)]
                return max(costs, key=lambda cost: cost.flops)
            case "call" | "async-start":
                return self.cost(self._called(instruction, r"(?:to_apply|calls)=%([^\s,]+)"))
            case "fusion":
                called = self._called(instruction, r"calls=%([^\s,]+)")
                cost = self.cost(called, fused=True)
                # A reduce-scatter in disguise: each device keeps its part of the sum, half of an all-reduce's bytes.
                halved = "all-reduce-scatter" in called
                return dataclasses.replace(cost, collective_bytes=cost.collective_bytes / 2) if halved else cost
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return Cost(collective_bytes=self._sent_bytes(kind, instruction, computation))
        return Cost()

    def _called(self, instruction: Instruction, pattern: str) -> str:
        name = instruction.attribute(pattern)
        if name is None:
            raise ValueError(f"no called computation: {instruction.name}")
        return name

    def _condition(self, instruction: Instruction) -> str:
        return self._called(instruction, r"condition=%([^\s,]+)")

    def _branches(self, instruction: Instruction) -> Iterator[str]:
        listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
        if listed is None:
            yield self._called(instruction, r"true_computation=%([^\s,]+)")
            yield self._called(instruction, r"false_computation=%([^\s,]+)")
        else:
            yield from re.findall(r"%([^\s,]+)", listed)

    def _rounds(self, loop: Instruction, computation: dict[str, Instruction]) -> int:
        """How often a loop runs: known to XLA, or from a counter that grows by a constant up to a constant."""
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations[self._condition(loop)]
        body = self.computations[self._called(loop, r"body=%([^\s,]+)")]
        root = next(instruction for instruction in condition.values() if instruction.is_root)
        compare, scope = self._unwrapped(root, condition)
        if compare.opcode != "compare":
            raise ValueError(f"loop of unknown length: {loop.name}")
        initial = computation[loop.operands[0]]

        def value(name: str) -> tuple[int | None, int | None]:
            """(constant, index in the loop's tuple) of an operand of the comparison."""
            operand = scope[name]
            if operand.opcode == "constant":
                return _constant(operand), None
            index = operand.attribute(r"index=(\d+)")
            if operand.opcode == "get-tuple-element" and index is not None:
                source = computation.get(initial.operands[int(index)]) if initial.opcode == "tuple" else None
                source = source and _copied(source, computation)
                return (_constant(source) if source else None), int(index)
            return None, None

        (start, index), (stop, _) = (value(name) for name in compare.operands)
        if start is None or stop is None or index is None or compare.attribute(r"direction=(\w+)") != "LT":
            raise ValueError(f"loop of unknown length: {loop.name}")
        return -(-(stop - start) // _increment(body, index))

    def _unwrapped(
        self, instruction: Instruction, computation: dict[str, Instruction]
    ) -> tuple[Instruction, dict[str, Instruction]]:
        """The root of a fusion in place of the fusion, and what its operands' names stand for."""
        if instruction.opcode != "fusion":
            return instruction, computation
        inner = self.computations[self._called(instruction, r"calls=%([^\s,]+)")]
        root = next(candidate for candidate in inner.values() if candidate.is_root)
        given = {
            name: computation[instruction.operands[int(parameter.literal)]]
            for name, parameter in inner.items()
            if parameter.opcode == "parameter"
        }
        return root, {**inner, **given}

    def _sent_bytes(self, kind: str, instruction: Instruction, computation: dict[str, Instruction]) -> float:
        size = self._group_size(instruction)
        inputs = sum(array.num_bytes for name in instruction.operands for array in computation[name].arrays)
        match kind:
            case "all-reduce":
                return 2.0 * inputs * (size - 1) / size
            case "all-gather":
                return float(inputs * (size - 1))
            case "reduce-scatter" | "all-to-all":
                return inputs * (size - 1) / size
            case _:
                return float(inputs)

    def _group_size(self, instruction: Instruction) -> int:
        attributes = instruction.attributes
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
            sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
            # An axis may be cut: 'name':(places before)size.
            parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))
            return math.prod(int(cut) if cut else sizes[axis] for axis, cut in parts)
        if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
            return int(counted.group(1))
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
            return len(listed.group(1).split(","))
        return self.num_partitions

    def _traffic(self, instruction: Instruction, computation: dict[str, Instruction]) -> Iterator[float]:
        """Bytes that an instruction outside any fusion moves from and to main memory."""
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return
        if instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # From one kind of memory to another: once, on the side that is the main memory.
            yield min((a.num_bytes for a in instruction.arrays if a.shape), default=0)
            return
        called = instruction.opcode == "fusion" and self._called(instruction, r"calls=%([^\s,]+)")
        inner = self.computations[called] if called else None
        for index, name in enumerate(instruction.operands):
            arrays = [array for array in computation[name].arrays if array.in_main_memory]
            whole = sum(array.num_bytes for array in arrays)
            if not arrays:
                continue
            if inner is not None:
                yield min(whole, self._bytes_read(inner, index))
            elif instruction.opcode in ("dynamic-slice", "gather"):
                yield min(whole, sum(array.num_bytes for array in instruction.arrays))
            elif not (instruction.opcode == "dynamic-update-slice" and index == 0):
                yield whole
        yield from self._written(instruction, inner, computation)

    def _bytes_read(self, fused: dict[str, Instruction], index: int) -> float:
        """Bytes that a fused computation reads of one of its parameters: slices count as what they take."""
        parameter = next(name for name, p in fused.items() if p.opcode == "parameter" and int(p.literal) == index)
        total = 0.0
        for user in fused.values():
            for place, operand in enumerate(user.operands):
                if operand != parameter:
                    continue
                if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    total += sum(array.num_bytes for array in user.arrays)
                elif user.opcode == "fusion":
                    called = self.computations[self._called(user, r"calls=%([^\s,]+)")]
                    total += self._bytes_read(called, place)
                elif not (user.opcode == "dynamic-update-slice" and place == 0):
                    return sum(array.num_bytes for array in fused[parameter].arrays)
        return total

    def _written(self, instruction, fused, computation) -> Iterator[float]:
        if instruction.opcode == "dynamic-update-slice":
            yield sum(array.num_bytes for array in computation[instruction.operands[1]].arrays)
            return
        updates = [i for i in fused.values() if i.opcode == "dynamic-update-slice"] if fused else []
        in_place = {update.arrays[0].shape: fused[update.operands[1]].arrays[0].num_bytes for update in updates}
        for array in instruction.arrays:
            if array.in_main_memory:
                yield in_place.get(array.shape, array.num_bytes)


def _constant(instruction: Instruction) -> int | None:
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    return int(instruction.literal) if is_integer else None


def _copied(instruction: Instruction, computation: dict[str, Instruction]) -> Instruction:
    while instruction.opcode in ("copy", "bitcast") and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    return instruction


def _increment(body: dict[str, Instruction], index: int) -> int:
    """By how much one round of a loop raises its counter."""
    root = next(instruction for instruction in body.values() if instruction.is_root)
    counter = _copied(body[root.operands[index]], body)
    steps = [_constant(_copied(body[name], body)) for name in counter.operands if name in body]
    return next((step for step in steps if step is not None), 1) if counter.opcode == "add" else 1


def _dot_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    left = computation[instruction.operands[0]].arrays[0].shape
    return (
        2.0
        * math.prod(instruction.arrays[0].shape)
        * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    )


def _convolution_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """Products with padding do not count: TPUs run batched matrix products as convolutions that are mostly padding."""
    left, right = (computation[name].arrays[0].shape for name in instruction.operands)
    labels = instruction.attribute(r"dim_labels=([\w\->?]+)") or ""
    left_labels, right_labels, out_labels = re.split(r"_|->", labels)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(re.findall(r"(\w+)=(\S+)", window))
    places = 1
    for axis in range(len(left_labels) - 2):
        setting = lambda name, default, axis=axis: fields[name].split("x")[axis] if name in fields else default
        label = str(axis)
        before = int(setting("pad", "0_0").split("_")[0])
        places *= valid_places(
            left[left_labels.index(label)],
            right[right_labels.index(label)],
            instruction.arrays[0].shape[out_labels.index(label)],
            int(setting("stride", "1")),
            before,
            int(setting("lhs_dilate", "1")),
            int(setting("rhs_dilate", "1")),
        )
    batch = left[left_labels.index("b")] / int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    return 2.0 * batch * right[right_labels.index("i")] * right[right_labels.index("o")] * places


def _kernel_cost(instruction: Instruction) -> Cost:
    """The estimate that a Pallas kernel carries in its `backend_config`; other custom calls cost nothing here."""
    estimate = instruction.attribute(r'"cost_estimate":(\{[^}]*\})')
    return Cost(flops=float(json.loads(estimate)["flops"])) if estimate else Cost()
