"""QuantDiT.py --inspect: a table from a configuration alone, and one line where there is none."""
import functools
import json
from pathlib import Path

import pytest
from conftest import call, error_line
from torch import nn

import cli.inspect
import QuantDiT
from architectures import survey
from architectures.examples import EXAMPLES, build, draw_call
from architectures.inspection import Inspection, inspect
from architectures.registry import architecture_of
from architectures.sites import linears_of
from cli.inspect import UNREAD, chosen_sites, inspect_settings
from cli.quantize_flags import IGNORED, make_parser
from config import SCOPES
from ditas.quantizing import look_into
from ditas.request import read_request

SIZES = {example.name: example.sizes for example in EXAMPLES}
FLUX = {"_class_name": "FluxTransformer2DModel", **SIZES["FluxTransformer2DModel"],
        "num_layers": 3, "num_single_layers": 5, "attention_head_dim": 32,
        "num_attention_heads": 4, "axes_dims_rope": (8, 8, 16)}


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.inspect, "inspect", inspected)


def inspected(configuration: dict) -> Inspection:
    """Look into each configuration once."""
    return _inspected(json.dumps(configuration))


@functools.cache
def _inspected(configuration: str) -> Inspection:
    return inspect(json.loads(configuration))


def write(path: str, content: dict) -> None:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def table(capsys, *argv: str) -> tuple[list[list[str]], list[str]]:
    """Print an inspection; return the cells of its table, and the other lines."""
    capsys.readouterr()
    call(QuantDiT, *argv, "--inspect")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return rows[2:], [line for line in lines if not line.startswith("|")]


def test_a_pipeline_is_inspected_without_weights(capsys):
    write("pipe/model_index.json", {"_class_name": "FluxPipeline", "transformer": ["diffusers"]})
    write("pipe/transformer/config.json", FLUX)
    rows, (first, last) = table(capsys, "--model", "pipe", "--recipe", "rtn")
    assert first == ("FluxTransformer2DModel: 8 blocks (3 in transformer_blocks, "
                     "5 in single_transformer_blocks)")
    cells = {row[0]: row[1:] for row in rows}

    # Width 128 and MLPs of 512: 16 bits before; codes of 4 bits and a scale a row after.
    queries = cells["transformer_blocks.*.attn.to_q+to_k+to_v"]
    assert queries[:4] == ["3", "3 of 128x128", "norm1.linear", "W4A8"]
    assert float(queries[4]) == pytest.approx(3 * 3 * 128 * 128 * 2 / 1e6, abs=0.006)
    assert cells["single_transformer_blocks.*.proj_out"][:3] == [
        "5", "1 of 128x640", "run time (gelu)"]
    assert cells["x_embedder"][3] == "16"
    # Twelve linears of a double block and five of a single one; GELU stops two and one.
    assert last.startswith("50 of 61 linears of the blocks fold")


def test_the_component_that_is_named_is_inspected(capsys):
    write("pipe/model_index.json", {"_class_name": "WanPipeline", "transformer": ["diffusers"],
                                    "transformer_2": ["diffusers"]})
    write("pipe/transformer/config.json", FLUX)
    write("pipe/transformer_2/config.json", {**FLUX, "num_layers": 2})
    _, lines = table(capsys, "--model", "pipe", "--recipe", "rtn")
    assert "8 blocks" in lines[0]
    _, lines = table(capsys, "--model", "pipe", "--recipe", "rtn", "--component", "transformer_2")
    assert "7 blocks" in lines[0]
    line = error_line(capsys, lambda: call(
        QuantDiT, "--model", "pipe", "--inspect", "--component", "vae"))
    assert "expected --component to be one of transformer, transformer_2" in line
    line = error_line(capsys, lambda: call(
        QuantDiT, "--model", "pipe/transformer", "--inspect", "--component", "vae"))
    assert "--component names a part of a pipeline, and 'pipe/transformer' is none" in line


def test_only_a_transformers_folder_is_needed(capsys):
    write("transformer/config.json", FLUX)
    rows, _ = table(capsys, "--model", "transformer", "--weight-bit", "8")
    bits = {row[4] for row in rows}
    assert "W8A8" in bits


def test_bytes_are_those_of_the_weights(capsys):
    write("folder/config.json", FLUX)
    rows, lines = table(capsys, "--model", "folder", "--weight-bit", "16", "--recipe", "rtn")
    assert [row[5] for row in rows] == [row[6] for row in rows]
    sizes = dict(FLUX)
    del sizes["_class_name"]
    model = build(next(example for example in EXAMPLES
                       if example.class_name == "FluxTransformer2DModel"), **sizes)
    megabytes = 2 * sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"{megabytes:.1f} MB before, {megabytes:.1f} MB after" in lines[-1]


def test_what_is_chosen_shows_in_the_table(capsys):
    write("folder/config.json", FLUX)
    flags = ("--model", "folder", "--recipe", "rtn")
    before, (_, all_blocks) = table(capsys, *flags)
    rows, (_, last) = table(
        capsys, *flags, "--include", "x_embedder|norm1.linear", "--exclude", r"to_q$|proj_out")
    changed = {row[0]: row[3:5] for row in rows if row not in before}
    assert changed == {
        "x_embedder": ["-", "W4A8"],
        "transformer_blocks.*.norm1.linear": ["-", "W4A8"],
        # What shares its input with a query goes with it.
        "transformer_blocks.*.attn.to_q+to_k+to_v": ["-", "16"],
        "single_transformer_blocks.*.proj_mlp+attn.to_q+attn.to_k+attn.to_v": ["-", "16"],
        "single_transformer_blocks.*.proj_out": ["-", "16"],
    }
    megabytes = {row[0]: row[5:] for row in rows}
    assert megabytes["transformer_blocks.*.attn.to_q+to_k+to_v"][0] == \
        megabytes["transformer_blocks.*.attn.to_q+to_k+to_v"][1]
    # Three of twelve linears go in a double block, all of a single one's.
    assert all_blocks.startswith("50 of 61") and last.startswith("21 of 27 linears")


def test_the_table_and_quantising_choose_the_same_linears(capsys):
    import ditas
    chosen = {"include": "norm_out|proj_mlp", "exclude": r"\.ff\.net\.2$"}
    write("folder/config.json", {"_class_name": "FluxTransformer2DModel",
                                 **SIZES["FluxTransformer2DModel"]})
    rows, _ = table(capsys, "--model", "folder", "--recipe", "rtn",
                    "--include", chosen["include"], "--exclude", chosen["exclude"])
    example = next(example for example in EXAMPLES if example.name == "FluxTransformer2DModel")
    done = ditas.quantize(build(example), None, "rtn", **chosen)
    assert {row[0] for row in rows if row[4] == "W4A8"} == {
        outcome.site.pattern for outcome in done.sites}


@pytest.mark.parametrize("scope", SCOPES)
# The sites of the second are written down by hand, with roles of their own.
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "DiTTransformer2DModel"])
def test_a_scope_holds_the_same_linears_in_the_table_and_in_quantising(capsys, name, scope):
    write("folder/config.json", {"_class_name": name, **SIZES[name]})
    argv = ("--model", "folder", "--recipe", "rtn", "--scope", scope)
    rows, _ = table(capsys, *argv)
    settings = inspect_settings(make_parser().parse_args(argv))
    chosen = chosen_sites(inspected(settings.configuration).discovery, settings)
    model = explored(name)
    quantised = set(linears_of(architecture_of(model).sites(model, scope)))
    assert set(linears_of(chosen)) == quantised
    assert sum(int(row[1]) * linears_in(row[2]) for row in rows if row[4] == "W4A8") \
        == len(quantised)


@functools.cache
def explored(name: str) -> nn.Module:
    """Build a model that carries what is quantised of it, as ``ditas.quantize`` lets it."""
    example = next(example for example in EXAMPLES if example.name == name)
    model = build(example)
    look_into(model, [draw_call(example)], read_request("rtn", {}))
    return model


def linears_in(weights: str) -> int:
    """Count the linears in a cell such as ``2 of 32x32, 1 of 64x32``."""
    return sum(int(part.split(" of ")[0]) for part in weights.split(", "))


def test_outside_linears_stand_where_they_run(capsys):
    write("folder/config.json", FLUX)
    rows, _ = table(capsys, "--model", "folder")
    names = [row[0] for row in rows]
    assert names.index("x_embedder") < names.index("transformer_blocks.*.norm1.linear")
    assert names[-1] == "proj_out"


def test_blocks_that_differ_are_told_apart():
    sizes = {**SIZES["SD3Transformer2DModel 3.5"], "num_layers": 6,
             "dual_attention_layers": (0, 1, 2)}
    found = inspect({"_class_name": "SD3Transformer2DModel", **sizes})
    assert not found.warning
    names = [site.name for site in found.discovery.sites]
    dual = [name for name in names if name.endswith("attn2.to_q+to_k+to_v")]
    assert len(dual) == 3
    assert all(found.places[name] == "norm1.linear" for name in dual)


def test_a_class_without_an_example_is_listed():
    # Its call takes an item out of a tensor, which no tracer follows.
    found = inspect({
        "_class_name": "OmniGenTransformer2DModel", "hidden_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 64, "num_layers": 2, "vocab_size": 16,
        "pad_token_id": 0, "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}})
    assert found.warning == "no call of OmniGenTransformer2DModel is known here, so that no fold " \
                            "could be proved"
    assert len(found.discovery.blocks) == 2
    assert not found.places


@pytest.mark.parametrize("files, message", [
    ({"model_index.json": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers"]}},
     "'given' is a StableDiffusionPipeline without a transformer"),
    ({"config.json": {"_class_name": "UNet2DConditionModel"}},
     "a UNet2DConditionModel is no transformer"),
    ({"config.json": {"_class_name": "BertModel"}}, "'BertModel' is no class of diffusers"),
    ({"config.json": {"hidden_size": 7}}, "'None' is no class of diffusers"),
    ({"config.json": []}, "is no configuration: expected a JSON object"),
    ({"notes.json": {}}, "'given' holds no model_index.json and no config.json"),
    ({"config.json": {**FLUX, "num_layers": 1, "num_single_layers": 1}},
     "FluxTransformer2DModel has no repeated blocks"),
    ({"config.json": {**FLUX, "num_layers": "many"}}, "this is no configuration of a Flux"),
])
def test_other_folders_are_refused(capsys, files, message):
    for name, content in files.items():
        write(f"given/{name}", content)
    assert message in error_line(capsys, lambda: call(QuantDiT, "--model", "given", "--inspect"))


def test_a_hub_id_without_network_is_refused(capsys, monkeypatch):
    import huggingface_hub

    def fail(*_args):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    line = error_line(capsys, lambda: call(QuantDiT, "--model", "some/model", "--inspect"))
    assert "'some/model' is no folder, and the hub did not give it (ConnectionError)" in line


@pytest.mark.parametrize("argv, message", [
    ([], "--inspect looks into a model of diffusers: give a folder with --model"),
    (["--model", "DiT-XL/2"], "DiT-XL/2 is one of this repository"),
    (["--model", ".", "--weight-bit", "1"], "--weight-bit 1 is not available"),
    (["--model", ".", "--exclude", "("], "--exclude '(' is no regular expression"),
    (["--model", ".", "--act-range", "static"], "static ranges are one per layer"),
    *((["--model", ".", f"--{flag.replace('_', '-')}", "7"],
       f"--{flag.replace('_', '-')} is for quantising, and --inspect only looks: drop it")
      for flag in UNREAD if flag not in ("vae", "svd", "export", "offload")),
    *((["--model", ".", *argv],
       f"{argv[0]} is for quantising, and --inspect only looks: drop it")
      for argv in (("--vae", "mse"), ("--svd", "exact"), ("--export", "diffusers"),
                   ("--offload",))),
])
def test_wrong_flags_are_refused(capsys, argv, message):
    assert message in error_line(capsys, lambda: call(QuantDiT, *argv, "--inspect"))


def test_every_flag_is_read_or_refused():
    args = vars(make_parser().parse_args([]))
    parts = {name for name in args if name.startswith("part_")}
    ignored = {name.replace("-", "_") for name in IGNORED}
    read = {"model", "component", "recipe", "weight_bit", "act_bit", "include", "exclude"}
    # With --path the export refuses --inspect.
    assert args.keys() - parts - ignored - {"inspect", "path"} == read | set(UNREAD)


def test_every_transformer_of_diffusers_is_surveyed_or_said_not_to_be():
    import diffusers
    left = survey.without_example()
    assert "FluxTransformer2DModel" not in left
    assert all(hasattr(diffusers, name) for name in left)


def test_the_survey_prints_a_table(capsys):
    survey.main(["DiTTransformer2DModel"])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| DiTTransformer2DModel"))
    # Two blocks: q, k and v are one site; ten of twelve linears fold into weights.
    assert row.startswith("| DiTTransformer2DModel | 2 | 8 | 12 | 10 | 0 | 2 | gelu 2 |")
    assert "10 of 12 linears of the blocks fold (83 %)" in printed
