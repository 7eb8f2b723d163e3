"""`python -m jax_router doctor`: that its answers are what happens, and its findings what is wrong."""

import re
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from jax_router import RouterConfig, _doctor, _native
from jax_router.__main__ import main
from jax_router._case import Case
from jax_router._doctor import Driver
from jax_router._explain import explain
from jax_router._native import GPUS

PLATFORM = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
CUDA = _native.load("cuda")
needs_cuda = pytest.mark.skipif(isinstance(CUDA, ImportError), reason="there is no CUDA module here")


def case(tokens=40, dtype=jnp.bfloat16, weight_dtype=jnp.bfloat16, **options):
    config = RouterConfig(**{"hidden_size": 64, "num_experts": 32, "top_k": 4, **options})
    return Case(config, tokens, jnp.dtype(dtype), jnp.dtype(weight_dtype))


CASES = {
    "usual": case(),
    "groups, f32": case(2000, jnp.float32, jnp.float32, num_groups=4, top_groups=2, selection_bias=False),
    "a weight in f32": case(8, weight_dtype=jnp.float32),
    "more choices than kernels take": case(num_experts=128, top_k=100),
    "softmax over all": case(score_fn="softmax", renormalize=False, logit_bias=True),
}


def native_ops(answers):
    return {op for answer in answers for op in ([answer.op] if answer.native else native_ops(answer.parts))}


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_what_is_lowered(name):
    for call, operands in _doctor.calls(CASES[name]).values():
        program = jax.jit(call).lower(*operands).as_text()
        calls = {f"jax_router.{op}" for op in native_ops(explain(call, *operands, platform=PLATFORM))}
        assert calls == set(re.findall(r"custom_call @(jax_router\.\w+)", program))


def test_nothing_is_wrong_here(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor", "--tokens=8", "--hidden=64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "Nothing is wrong."
    shown = "\n".join(lines)
    for word in (jax.__version__, "FFI API", jax.devices()[0].device_kind, "8 tokens", "native: ", "combine_cotangent"):
        assert word in shown
    assert ("mesh " in shown) == (jax.device_count() > 1)


def test_a_case_beyond_the_limits_is_wrong(capsys):
    assert main(["doctor", "--top-k=100"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "wrong activation_topk by the reference: at most top_k = 64, got 100 ->" in shown
    assert "ok expert_dispatch native" in shown


@needs_cuda
@pytest.mark.parametrize("gpu", GPUS)
def test_a_gpu_that_is_not_here(gpu):
    """The plan is the kernels' own, and dense_router is fused where it pays on that GPU."""
    config = RouterConfig(hidden_size=4096, num_experts=256, top_k=6, selection_bias=False)
    for tokens in (8, 4096):
        big = Case(config, tokens, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
        found = {finding.subject: finding for finding in _doctor.ops(big, gpu)}
        sizes = {"rows": tokens, "experts": 256, "k": 6}
        plan, _ = CUDA.plans("activation_topk", GPUS[gpu], dtype="f32", **sizes)
        assert found["activation_topk"].text == f"native: {plan}"
        plan, _ = CUDA.plans("dense_router", GPUS[gpu], hidden=4096, dtype="bf16", **sizes)
        if plan and CUDA.pays("dense_router", GPUS[gpu], hidden=4096, dtype="bf16", **sizes):
            assert found["dense_router"].text == f"native: {plan}"
        else:
            assert found["dense_router"].text.startswith("XLA's product, then activation_topk (")
        assert {finding.level for finding in found.values()} == {"ok"}


@needs_cuda
@pytest.mark.parametrize("gpu", GPUS)
def test_both_gradients_on_a_gpu_that_is_not_here(gpu):
    config = RouterConfig(hidden_size=2048, num_experts=128, top_k=8, selection_bias=False)
    big = Case(config, 8192, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
    (found,) = (finding for finding in _doctor.ops(big, gpu) if finding.subject == "routed_gradients")
    plan, _ = CUDA.plans("routed_gradients", GPUS[gpu], rows=8192, hidden=2048, experts=128, k=8)
    assert found.text.startswith(f"native: {plan}" if plan else "XLA's product, then routed_cotangent")


@needs_cuda
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"hidden_size": 4100}, "multiple of 8"),
        ({"top_k": 20}, "top_k = 16"),
        ({"num_experts": 60, "num_groups": 6, "top_groups": 3}, "groups of 4, 8"),
    ],
)
def test_why_it_is_not_fused(options, reason):
    config = RouterConfig(**{"hidden_size": 4096, "num_experts": 48, "top_k": 6, **options})
    small = Case(config, 8, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
    first = _doctor.ops(small, "H100")[0]
    assert first.level == "note"
    assert reason in first.text
    assert first.mend


@needs_cuda
def test_few_tokens_and_a_weight_in_f32_are_fused():
    config = RouterConfig(hidden_size=4096, num_experts=256, top_k=6)
    few = Case(config, 8, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
    first = _doctor.ops(few, "H100")[0]
    assert first.level == "ok"
    assert re.fullmatch(r"native: bf16xf32 scores few .*", first.text)


@pytest.mark.parametrize(
    ("built_for", "runs", "does_not"),
    [
        ("90a-real", [90], [80, 89, 100, 120]),
        ("80-real", [80, 86, 89], [75, 90]),
        ("89-real", [89], [80, 86]),
        ("80-real 90a-real 100a-real 100-virtual", [80, 86, 90, 100, 103, 120], [75]),
        ("80", [80, 90, 120], [75]),
        ("100f-real", [100, 103], [90, 120]),
        ("native", [80, 90], []),
    ],
)
def test_which_gpus_there_is_code_for(built_for, runs, does_not):
    assert [which for which in (*runs, *does_not) if _doctor.covers(built_for, which)] == runs


class MadeUp(ModuleType):
    """A CUDA module of which only this is asked."""

    cuda_version = 13000
    architectures = "90-real"


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(_native, "load", lambda platform: MadeUp(platform))


@pytest.mark.parametrize(("version", "level"), [(12080, "wrong"), (13000, "ok"), (13010, "ok")])
def test_an_old_driver(version, level, made_up):
    finding, gpu = _doctor._driver(Driver(version, (("NVIDIA H100", 90),)))
    assert finding.level == level
    assert bool(finding.mend) == (level != "ok")
    assert gpu.text == "NVIDIA H100, compute capability 9.0"


def test_a_gpu_that_there_is_no_code_for(made_up):
    levels = [(found.level, found.mend) for found in _doctor.architectures(Driver(13000, (("a", 80), ("b", 90))), None)]
    assert [level for level, _ in levels] == ["wrong", "note"]  # the kernels of dense_router for many tokens need 90a
    assert levels[0][1].endswith("80-real")
    assert levels[1][1].endswith("90a-real")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="JAX uses the GPU of this machine")
@pytest.mark.parametrize(("version", "extra"), [(12080, "cuda12"), (13000, "cuda13")])
def test_jax_leaves_the_gpu_alone(version, extra, monkeypatch):
    monkeypatch.setattr(_doctor, "_platforms_mend", lambda: "")
    *_, finding = _doctor.machine(Driver(version, (("NVIDIA H100", 90),)))
    assert finding.level == "wrong"
    assert "though there is a GPU: NVIDIA H100" in finding.text
    assert finding.mend == f"pip install 'jax-router[{extra}]'"


def test_a_module_that_is_missing(monkeypatch, capsys):
    """It is wrong where it is needed; the rest is looked at as well."""
    monkeypatch.setattr(_native, "load", lambda platform: ImportError("no such file"))
    assert [finding.level for finding in _doctor.modules(is_needed=False)] == ["wrong", "note"]
    assert {finding.level for finding in _doctor.modules(is_needed=True)} == {"wrong"}
    assert main(["doctor", "--gpu=H100"]) == 1
    assert "not looked at: the cuda kernels are not loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", None),
        ("--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1", None),
        ("--xla_gpu_autotune_level=4", None),
        ("--xla_dump_to=x --xla_gpu_enable_command_buffer=", "xla_gpu_enable_command_buffer="),
        ("--xla_gpu_enable_command_buffer=FUSION", "xla_gpu_enable_command_buffer=FUSION"),
        ("--xla_gpu_graph_min_graph_size=100", "xla_gpu_graph_min_graph_size=100"),
        ("--xla_gpu_autotune_level=0", "xla_gpu_autotune_level=0"),
    ],
)
def test_flags_that_matter(flags, named):
    (finding,) = _doctor.flags(flags)
    assert finding.level == ("note" if named else "ok")
    assert (named or "nothing") in finding.text
