"""Writes csrc and tests/launches as a host compiler reads them: python translate.py TARGET.

What is inline assembly becomes a call of emulation.h by the table below, of which each instruction is one line; where a
kernel has one that is missing there, this says so. Variables in shared memory become references into that of the block.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "cuda_runtime_api.h")
# Kernels with tensor cores, and the copy engine's part.
LEFT_OUT = ("dense_router_few.cu", "dense_router_many.cu", "hopper.cuh", "routed_gradients.cu", "tensor_map.cuh")

# What a statement's text has in it, and what that does to its operands.
INSTRUCTIONS = {
    "max.NaN.f32": "{0} = emulation::max_nan({1}, {2})",
    "max.NaN.bf16x2": "{0} = emulation::max_nan_of_two<__nv_bfloat16>({0}, {1})",
    "max.NaN.f16x2": "{0} = emulation::max_nan_of_two<__half>({0}, {1})",
    "ex2.approx.ftz.f32": "{0} = std::exp2({1})",
    "rcp.approx.ftz.f32": "{0} = emulation::flushed(1.0f / emulation::flushed({1}))",
    "sqrt.approx.ftz.f32": "{0} = std::sqrt({1})",
    "setp.gt.u64 p, %1, %2; @p add.s32 %0, %0, 1": "{0} += uint64_t({1}) > uint64_t({2})",
    "setp.gt.u64 p, %1, %2; @p add.f32 %0, %0, 0f00000001": "{0} += ({1}) > ({2}) ? 0x1p-149f : 0.0f",
    "setp.gt.f64 p, %1, %2; @p add.f32 %0, %0, 0f00000001": "{0} += ({1}) > ({2}) ? 0x1p-149f : 0.0f",
    "setp.gt.u32 p, %1, %2; @p add.f32 %0, %0, 0f00000001": "{0} += ({1}) > ({2}) ? 0x1p-149f : 0.0f",
    "setp.gt.f32 p, %1, %2; @p add.f32 %0, %0, 0f00000001": "{0} += ({1}) > ({2}) ? 0x1p-149f : 0.0f",
    "setp.ge.f32 p, %1, %2; @p add.f32 %0, %0, %3": "{0} += ({1}) >= ({2}) ? ({3}) : 0.0f",
    "setp.geu.f32 p, %1, %2; @p add.f32 %0, %0, %3": "{0} += !(({1}) < ({2})) ? ({3}) : 0.0f",
    "setp.ge.u32 p, %1, %2; @p add.f32 %0, %0, %3": "{0} += ({1}) >= ({2}) ? ({3}) : 0.0f",
    "setp.ge.u32 p, %1, %2; @p add.u32 %0, %0, 1": "{0} += ({1}) >= ({2})",
    "shfl.sync.up.b32 other|p, %0, %1, %2, -1; @p add.s32": "if (decltype({0}) below; emulation::lane_below({0}, {1}, "
    "{2}, below)) {0} += below",
    "no_allocate.u16": "std::memcpy(&{0}, {1}, 2)",
    "no_allocate.s32": "{0} = *({1})",
    "no_allocate.v2.s32": "{0} = ({2})->x, {1} = ({2})->y",
    "no_allocate.v4.s32": "{0} = ({4})->x, {1} = ({4})->y, {2} = ({4})->z, {3} = ({4})->w",
    "cache_hint.v2.u32": "std::memcpy(&{0}, {2}, 4), std::memcpy(&{1}, {2} + 2, 4)",
    "cache_hint.v4.f32": "{0} = ({4})[0], {1} = ({4})[1], {2} = ({4})[2], {3} = ({4})[3]",
    "st.relaxed.gpu.global.b128": "emulation::store_packet({0}, {1}, {2})",
    "ld.relaxed.gpu.global.b128": "emulation::load_packet({0}, {1}, {2})",
    ".v4.u32": "emulation::load_16_bytes({0}, {1}, {2}, {3}, {4})",
    "createpolicy": "{0} = 0",
    "griddepcontrol": "",
    "%%cluster_ctarank": "{0} = emulation::block_of_cluster()",
    "%%tid.x": "{0} = threadIdx.x",
    "barrier.cluster.arrive": "emulation::cluster_arrive()",
    "barrier.cluster.wait": "emulation::cluster_wait()",
    "fence.acq_rel.cluster": "",
    "mapa.shared::cluster": "{0} = emulation::in_block({0}, {1})",
    "ld.shared::cluster.u32": "{0} = *static_cast<const volatile uint32_t*>(emulation::at({1}))",
    "ld.shared.u32": "{0} = *static_cast<const volatile uint32_t*>(emulation::at({1}))",
    "setp.ne.u32 p, %2, 0; @p atom.shared.add.u32": "if ({2}) {0} = "
    "atomicAdd(static_cast<uint32_t*>(emulation::at({1})), 1)",
    "setp.ne.u32 p, %2, 0; @p st.shared.b64": "if ({2}) *static_cast<uint64_t*>(emulation::at({0})) = {1}",
    "setp.ne.u32 p, %1, 0; @p red.shared.add.u32": "if ({1}) ++*static_cast<uint32_t*>(emulation::at({0}))",
    "setp.ne.u32 p, %2, 0; @p red.shared.or.b32": "if ({2}) *static_cast<uint32_t*>(emulation::at({0})) |= {1}",
    "red.shared.add.u32": "++*static_cast<uint32_t*>(emulation::at({0}))",
    "atom.shared::cluster.add.u32": "{0} = atomicAdd(static_cast<uint32_t*>(emulation::at({1})), {2})",
    "atom.shared.add.u32": "{0} = atomicAdd(static_cast<uint32_t*>(emulation::at({1})), {2})",
    "mbarrier.init": "emulation::init_barrier({0}, {1})",
    "mbarrier.arrive.expect_tx": "emulation::arrive({0}, {1})",
    "mbarrier.arrive.shared": "emulation::arrive({0}, 0)",
    "mbarrier.try_wait": "emulation::wait_for_barrier({0}, {1})",
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64": "emulation::store_later({0}, {1}, 8, {2})",
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32": "emulation::store_later({0}, {1}, 4, {2})",
    "cp.async.cg.shared.global [%0], [%1], 16;": "emulation::copy_later({0}, {1}, 16, 16)",
    "cp.async.cg.shared.global [%0], [%1], 16, %2;": "emulation::copy_later({0}, {1}, {2}, 16)",
    "cp.async.ca.shared.global [%0], [%1], 8;": "emulation::copy_later({0}, {1}, 8, 8)",
    "cp.async.commit_group": "emulation::commit_copies()",
    "cp.async.wait_group": "emulation::wait_for_groups({0})",
    "cp.async.wait_all": "emulation::wait_for_copies()",
}

STRING = r'"(?:[^"\\]|\\.)*"'


def parts(text: str, separator: str) -> list[str]:
    """What stands between separators that are in no brackets or strings."""
    found, depth = [""], 0
    for token in re.findall(rf"{STRING}|::|.", text, re.DOTALL):
        depth += (token in "([{") - (token in ")]}") if len(token) == 1 else 0
        if token == separator and depth == 0:
            found.append("")
        else:
            found[-1] += token
    return found


def call(statement: str) -> str:
    """What an assembly statement does, given what is in its brackets."""
    # Two colons are an empty list between them, unless they stand in an operand.
    statement = re.sub(rf"({STRING}|\w+::\w+)|::", lambda match: match[1] or ": :", statement)
    text, *lists = parts(statement, ":")
    template = "".join(piece[1:-1] for piece in re.findall(STRING, text))
    if not template:
        return ""
    operands = [operand for each in lists[:2] for operand in parts(each, ",") if operand.strip()]
    values = [re.sub(rf"^\s*{STRING}\s*\((.*)\)\s*$", r"\1", operand, flags=re.DOTALL) for operand in operands]
    for instruction, meaning in INSTRUCTIONS.items():
        if instruction in template:
            return meaning.format(*values)
    raise SystemExit(f"no emulation of {template}")


def without_assembly(code: str) -> str:
    result, end = "", 0
    for match in re.finditer(r"\b(?:asm(?:\s+volatile)?|JR_CLUSTER_ASM)\s*\((?!__VA_ARGS__|\.\.\.)", code):
        closing, depth = match.end(), 1
        for token in re.finditer(rf"{STRING}|[()]", code[match.end() :]):
            depth += {"(": 1, ")": -1}.get(token[0], 0)
            if depth == 0:
                closing += token.start()
                break
        result += code[end : match.start()] + call(code[match.end() : closing])
        end = closing + 1
    return result + code[end:]


ALIGNMENT = r"(?:(?:__align__|alignas)\((\d+)\)\s+)?"


def shared_variables(match: re.Match) -> str:
    alignment, kind, names = match.groups()
    declarations = []
    for name, sizes in re.findall(r"(\w+)((?:\[[^\]]*\])*)", names):
        declarations.append(f"auto& {name} = emulation::shared<{kind}{sizes}, __COUNTER__, {alignment or 1}>();")
    return " ".join(declarations)


def translated(code: str) -> str:
    code = without_assembly(code)
    code = re.sub(r"^extern __shared__ .*\n", "", code, flags=re.MULTILINE)  # pair_select.cuh's, of all its users
    code = re.sub(r"\bblock_shared_memory\b", "static_cast<uint4*>(emulation::dynamic_memory())", code)
    code = re.sub(
        rf"extern __shared__ {ALIGNMENT}(\w+) (\w+)\[\];",
        r"auto* \3 = static_cast<\2*>(emulation::dynamic_memory());",
        code,
    )
    code = re.sub(rf"\b__shared__ {ALIGNMENT}(\w+(?:<[^;>]*>)?) ([^;]*);", shared_variables, code)
    for name, place in ("threadIdx", "thread"), ("blockIdx", "block"), ("gridDim", "blocks"), ("blockDim", "threads"):
        code = re.sub(rf"(?<![\w.]){name}\b", f"emulation::place.{place}", code)
    code = code.replace("if (++looks == kMostLooks) __trap();", "emulation::look(looks++);")
    code = re.sub(r"\b(fmaxf|fminf)\(", r"emulation::\1(", code)
    return code.replace("__noinline__", "__attribute__((noinline))").replace("__expf", "std::exp")


def main() -> None:
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    for folder in ("csrc/common", "csrc/cuda", "tests/launches", "tests/emulation"):
        shutil.copytree(ROOT / folder, target / folder)
    for path in (target / "csrc").rglob("*.*"):
        if path.name in LEFT_OUT:
            path.unlink()
        else:
            path.write_text(translated(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name in HEADERS:
        (target / "tests" / "emulation" / name).write_text('#include "emulation.h"\n', encoding="utf-8")


if __name__ == "__main__":
    main()
