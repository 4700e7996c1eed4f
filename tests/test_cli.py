"""Wrong command lines: one line on stderr, exit status 2, nothing half-written."""
import json
import multiprocessing
import os
import pickle
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import call, error_line, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import config
import QuantDiT
import sample_merge_TAS
from cli import settings
from cli.memory import keep_freed_memory, large_blocks_apart, return_freed_memory
from cli.quantize import judgement
from cli.settings import quantize_settings
from sampling.class_conditional import ClassConditional

ROOT = Path(__file__).parents[1]
SCRIPTS = {"quant": QuantDiT, "sample": sample_merge_TAS}
QUICK = ["--model", "DiT-Digits", "--num-sampling-steps", "2", "--class-labels", "0,1"]


def fails(capsys, script: str, *argv: str) -> str:
    return error_line(capsys, lambda: call(SCRIPTS[script], *argv))


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "digits.safetensors"
    call(QuantDiT, *QUICK, "--recipe", "rtn", "--output", path)
    return path


@pytest.mark.parametrize("argv, message", [
    (["--model", "DiT-XXL/2"], "unknown model 'DiT-XXL/2': expected one of DiT-XL/2"),
    (["--model", "w.safetensors"], "or the folder or hub id of a diffusers pipeline (a file of "
     "float weights goes with --ckpt, a quantised checkpoint with --path)"),
    (["--model", "DiT-Emoji", "--recipe", "qdit", "--judge", "fvd"],
     "DiT-Emoji makes images: give --judge fid (of all models the digits alone have videos"),
    (["--recipe", "magic"], "--recipe magic is not available: expected one of rtn"),
    (["--weight-bit", "1"], "--weight-bit 1 is not available: expected one of 2, 3"),
    (["--weight-bit", "9"], "--weight-bit 9 is not available"),
    (["--act-bit", "3"], "--act-bit 3 is not available: expected one of 4, 5, 6, 7, 8, 16"),
    (["--act-bit", "eight"], "invalid int value"),
    (["--recipe", "ditas-published", "--weight-scales", "two-level"],
     "two-level weight scales are for groups along the inputs"),
    (["--iterations", "5"],
     "--iterations has no effect on this recipe: it is for --weight adaround"),
    (["--group-size", "32", "--weight-granularity", "channel", "--weight-scales", "float"],
     "--group-size has no effect on this recipe"),
    (["--search-steps", "published", "--alpha", "0.5"],
     "--search-steps has no effect on this recipe: it is for --alpha grid"),
    (["--recipe", "rtn", "--calibration-images", "4"],
     "--calibration-images has no effect on this recipe: it is for recipes that look at data"),
    (["--recipe", "qdit", "--tune", "4"],
     "--tune has no effect on this recipe: it is for --weight-scales two-level"),
    (["--tune", "-1"], "--tune -1"),
    (["--adaln-weight-bit", "6"], "--adaln-weight-bit 6 is not available"),
    (["--nonsense"], "nonsense"),
    (["--model", "DiT-Digits", "--image-size", "256"],
     "image size 256 does not fit this model: expected 16"),
    (["--model", "DiT-XL/2", "--image-size", "128"],
     "image size 128 does not fit this model: expected 256 or 512"),
    (["--num-sampling-steps", "0"], "expected 1 to 1000"),
    (["--num-sampling-steps", "1001"], "expected 1 to 1000"),
    (["--cfg-scale", "0.5"], "--cfg-scale 0.5 is too small: expected at least 1"),
    (["--cfg-scale", "nan"], "--cfg-scale nan"),
    (["--seed", "-1"], "--seed -1"),
    (["--model", "DiT-Digits", "--class-labels", "3,10"], "expected numbers from 0 to 9"),
    (["--model", "DiT-Digits", "--class-labels", "3;4"], "expected numbers from 0 to 9"),
    (["--model", "DiT-Digits", "--recipe", "smoothquant", "--smooth-timestep", "50"],
     "expected 0 to 49"),
    (["--model", "DiT-Digits", "--group-size", "48"], "group size 48 does not divide"),
    (["--model", "DiT-Digits", "--group-size", "0"], "--group-size 0"),
    (["--model", "DiT-Digits", "--lowrank", "-1"], "--lowrank -1"),
    (["--model", "DiT-Digits", "--ckpt", "nothing.pt"], "weights 'nothing.pt' do not exist"),
    (["--model", "DiT-B/2"], "no published weights of DiT-B/2"),
    (["--threads", "0"], "--threads 0 is too small: expected at least 1"),
    (["--model", "DiT-Digits", "--output", "/dev/null/x.safetensors"],
     "cannot write to folder '/dev/null'"),
])
def test_quantdit_refuses(capsys, argv, message):
    words = argv if "--model" in argv else ["--model", "DiT-Digits", *argv]
    assert message in fails(capsys, "quant", *words)
    left = {path.name for path in Path.cwd().rglob("*")}
    assert left <= {"results"}, left


@pytest.mark.parametrize("argv, message", [
    (["--path", "nothing"], "checkpoint 'nothing' does not exist"),
    (["--weight-bit", "4"], "give it with --path"),
    (["--model", "DiT-XXL/2"], "while a quantised checkpoint, or the folder of a pipeline, goes "
     "with --path"),
    (["--cfg-scale", "0.99"], "--cfg-scale 0.99 is too small"),
    (["--num-sampling-steps", "1001"], "expected 1 to 1000"),
    (["--num-fid-samples", "0"], "--num-fid-samples 0"),
    (["--per-proc-batch-size", "0"], "--per-proc-batch-size 0"),
    (["--model", "DiT-Digits", "--class-labels", "10"], "expected numbers from 0 to 9"),
    (["--model", "DiT-Digits", "--sample-dir", "/dev/null"], "cannot write to folder"),
    (["--eta", "2"], "--eta 2.0 is out of range"),
    (["--threads", "0"], "--threads 0"),
    (["--model", "DiT-Digits", "--backend", "integer"],
     "--backend integer needs a quantised checkpoint"),
    (["--dtype", "float16"], "invalid choice"),
])
def test_sampling_refuses(capsys, argv, message):
    assert message in fails(capsys, "sample", *argv)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("flag, value", [
    ("--weight-bit", "8"),
    ("--act-bit", "4"),
    ("--image-size", "256"),
    ("--model", "DiT-XL/2"),
    ("--num-classes", "1000"),
    ("--model", "DiT-Digits-Outliers"),
])
def test_flags_that_contradict_the_checkpoint_are_refused(capsys, checkpoint_path, flag, value):
    line = fails(capsys, "sample", "--path", checkpoint_path, flag, value)
    assert f"{flag} {value} contradicts" in line


@pytest.mark.parametrize("argv, labels", [
    ([], tuple(i % 10 for i in range(16))),
    (["--calibration-images", "3"], (0, 3, 6)),
    (["--class-labels", "7,2"], (7, 2)),
    (["--class-labels", "7,2", "--calibration-images", "5"], (7, 2, 7, 2, 7)),
    (["--recipe", "ditas-tuned"], tuple(i % 10 for i in range(96))),
])
def test_classes_take_turns_among_the_images_of_calibration(argv, labels):
    args = QuantDiT.make_parser().parse_args(["--model", "DiT-Digits", *argv])
    assert quantize_settings(args).labels == labels


def test_a_file_that_cannot_be_read_is_no_full_disk(capsys, checkpoint_path, monkeypatch):
    def load(self, processes):
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(ClassConditional, "load", load)
    line = fails(capsys, "sample", "--path", checkpoint_path)
    assert "cannot read what makes the images ([Errno 13] Permission denied: " in line
    assert "make room" not in line


@pytest.mark.parametrize("judge, loss, shown", [
    ("sqnr", -18.3, "18.3 dB SQNR"), ("fid", 7.25, "FID 7.2"), ("fvd", 101.06, "FVD 101.1")])
def test_a_judge_is_told_as_what_it_measures(judge, loss, shown):
    assert judgement(judge, loss) == shown


@pytest.mark.parametrize("argv, images", [
    (["--model", "DiT-Digits"], 200),
    (["--model", "DiT-Digits", "--output", "it's here/a b", "--vae", "mse"], 200),
    (["--model", "DiT-XL/2", "--weight-bit", "8", "--num-sampling-steps", "100"], 10_000),
])
def test_the_next_command_samples_what_was_quantised(argv, images, monkeypatch):
    settings = quantize_settings(QuantDiT.make_parser().parse_args(argv))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    launcher, script, *flags = shlex.split(settings.sampling_command)
    assert (launcher, script) == ("python", "sample_merge_TAS.py")
    args = sample_merge_TAS.make_parser().parse_args(flags)
    assert (args.path, args.vae, args.num_fid_samples) == (
        str(settings.output), settings.model.vae, images)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    words = shlex.split(settings.sampling_command)
    assert words[:4] == ["torchrun", "--nnodes=1", "--nproc_per_node=3", "sample_merge_TAS.py"]
    assert words[4:] == flags


def test_parts_that_were_changed_show_in_the_name(capsys):
    call(QuantDiT, *QUICK, "--recipe", "rtn", "--act-granularity", "token")
    name = "DiT-Digits-16-W4A8-rtn-act-granularity=token"
    written = sorted(path.name for path in Path("results").iterdir())
    assert written == [f"{name}.png", f"{name}.safetensors"]
    capsys.readouterr()
    call(sample_merge_TAS, "--path", f"results/{name}", "--num-fid-samples", "2", "--threads", "1")
    assert "wrote 2 images" in capsys.readouterr().out


def page_faults(tensors: int) -> int:
    """Count the page faults of making and freeing 48 MB in so many tensors 20 times.

    There are 12,000 pages each time if the memory goes back to the system.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        made = [torch.ones(12 * 2 ** 20 // tensors) for _ in range(tensors)]
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
# Of 4 MB, and of more than the 32 MiB that glibc's threshold can be.
@pytest.mark.parametrize("tensors", [12, 1])
def test_freed_memory_is_used_again(tensors):
    keep_freed_memory()
    page_faults(tensors)
    assert page_faults(tensors) < 12_000


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def in_a_fresh_process(measure: Callable[[], float]) -> float:
    """Measure where no test before has left gaps in the heap."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure)


def share_that_goes_back() -> float:
    keep_freed_memory()
    size = 200 * 2 ** 20
    tensors = [torch.ones(size // 4), torch.ones(1024)]
    tensors.append(tensors)  # in a cycle, which only the collector frees
    kept = tensors[1]
    before = resident_bytes()
    del tensors
    return_freed_memory()
    assert kept.sum() == 1024
    return (before - resident_bytes()) / size


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_memory_that_was_freed_below_what_is_kept_can_go_back():
    assert in_a_fresh_process(share_that_goes_back) > 0.9


def growth_over_what_stays() -> float:
    keep_freed_memory()
    before = resident_bytes()
    with large_blocks_apart():
        # Each tensor that stays lies above one that goes, and is larger than its gap.
        stay = []
        for megabytes in range(8, 24):
            gone = torch.ones(megabytes * 2 ** 18 - 1024)
            stay.append(torch.ones(megabytes * 2 ** 18))
            del gone
    growth = resident_bytes() - before
    # Afterwards what is freed is kept again.
    page_faults(1)
    assert page_faults(1) < 12_000
    return growth / sum(tensor.nbytes for tensor in stay)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_blocks_apart_leave_no_gaps():
    # With gaps it is twice what stays.
    assert in_a_fresh_process(growth_over_what_stays) < 1.5


def test_flags_that_agree_with_the_checkpoint_are_fine(capsys, checkpoint_path):
    call(sample_merge_TAS, "--path", checkpoint_path.with_suffix(""),
         "--model", "DiT-Digits", "--image-size", "16", "--weight-bit", "4", "--act-bit", "8",
         "--num-fid-samples", "3", "--per-proc-batch-size", "2")
    assert "wrote 3 images" in capsys.readouterr().out


def test_other_checkpoints_are_refused(capsys, checkpoint_path, tmp_path):
    tensors = load_file(checkpoint_path)
    with safe_open(checkpoint_path, framework="pt") as file:
        fields = json.loads(file.metadata()["ditas"])

    def save(name: str, **changed) -> None:
        save_file(tensors, name, metadata={"ditas": json.dumps({**fields, **changed})})

    save("version.safetensors", format_version=0)
    assert "format version 0, expected 1" in fails(capsys, "sample", "--path", "version")
    save("other.safetensors", model="DiT-S/4", image_size=256)
    assert "another model" in fails(capsys, "sample", "--path", "other")
    Path("cut.safetensors").write_bytes(checkpoint_path.read_bytes()[:-1000])
    assert "truncated" in fails(capsys, "sample", "--path", "cut")
    both = fails(capsys, "sample", "--path", checkpoint_path, "--ckpt", "x.pt")
    assert "give one of them" in both

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    assert "not a safetensors file" in fails(capsys, "sample", "--path", "evil.pt")
    unread = fails(capsys, "quant", "--model", "DiT-Digits", "--ckpt", "evil.pt")
    assert "not a file of plain tensors" in unread
    assert not (tmp_path / "ran").exists() and not (tmp_path / "samples").exists()


def test_weights_of_another_model_are_refused(capsys):
    torch.save({"ema": random_model(depth=2).state_dict()}, "small.pt")
    line = fails(capsys, "quant", "--model", "DiT-Digits", "--ckpt", "small.pt")
    assert "does not hold the weights of DiT-Digits" in line


def test_an_unreachable_server_is_reported_with_the_way_out(capsys, monkeypatch):
    def offline(url, path, **_):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = fails(capsys, "quant", "--model", "DiT-XL/2", "--image-size", "256")
    assert "by hand" in line and not list(Path("results").iterdir())


def test_the_published_command_lines_parse():
    command = ("--image-size 256 --seed 1 --model DiT-XL/2 --act-bit 8 --weight-bit 4 "
               "--num-sampling-steps 100")
    args = QuantDiT.make_parser().parse_args(command.split())
    assert (args.image_size, args.seed, args.model) == (256, 1, "DiT-XL/2")
    assert (args.act_bit, args.weight_bit, args.vae) == (8, 4, "ema")
    pictured = QuantDiT.make_parser().parse_args(["--model", "DiT-Digits"])
    assert quantize_settings(pictured).cfg_scale == 4.0
    command = ("--image-size 256 --model DiT-XL/2 --num-fid-samples 10000 --act-bit 8 "
               "--weight-bit 4 --path /path/DiTAS_Model --num-sampling-steps 100")
    args = sample_merge_TAS.make_parser().parse_args(command.split())
    assert (args.path, args.num_fid_samples) == ("/path/DiTAS_Model", 10000)
    assert args.per_proc_batch_size == 64
    assert (args.global_seed, args.tf32, args.sample_dir, args.fold) == (0, True, "samples", True)
    # Where the command line is silent, the model's settings say it: pipelines have their own.
    assert (args.cfg_scale, config.sampling_cfg_scale, settings.PICTURE_CFG_SCALE) == (
        None, 1.5, 4.0)


# The published QuantDiT.py's flags that it never reads, with its own defaults.
NEVER_READ = {
    "--results-dir": "results",
    "--global-batch-size": "256",
    "--global-seed": "0",
    "--num-workers": "4",
    "--epochs": "1",
    "--per-proc-batch-size": "2",
    "--log-every": "100",
    "--ckpt-every": "5000",
}


def test_flags_that_the_published_script_never_reads_leave_a_warning_and_the_same_bytes(capsys):
    call(QuantDiT, *QUICK, "--recipe", "rtn", "--output", "without")
    capsys.readouterr()
    ignored = [word for pair in NEVER_READ.items() for word in pair]
    call(QuantDiT, *QUICK, "--recipe", "rtn", "--output", "with", *ignored)
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert all(flag in warnings[0] for flag in NEVER_READ)
    assert Path("with.safetensors").read_bytes() == Path("without.safetensors").read_bytes()

    call(QuantDiT, *QUICK, "--recipe", "rtn", "--epochs", "3")
    assert "warning: --epochs: no effect" in capsys.readouterr().err


def test_a_mistake_beside_such_a_flag_still_leaves_one_line(capsys):
    assert "--seed -1" in fails(capsys, "quant", "--seed", "-1", "--epochs", "3")


@pytest.mark.parametrize("script, argv", [
    ("QuantDiT.py", ["--model", "DiT-Nope"]),
    ("sample_merge_TAS.py", ["--path", "nothing"]),
    ("QuantDiT.py", ["--act-bit"]),
])
def test_a_real_process_exits_with_2_and_one_line(script, argv):
    done = subprocess.run([sys.executable, ROOT / script, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{script}: error: ")
