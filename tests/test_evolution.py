"""The search for group sizes: what it evaluates and finds, and how it goes on after a crash."""
import io
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from architectures.sites import single
from quant.refinement.draws import Budget
from quant.refinement.evolution import evolve
from quant.refinement.group_sizes import (
    bit_ops,
    bit_ops_at_most,
    group_choices,
    mean_at_least,
    mean_group_size,
)
from report import figures

SIZES = (32, 64, 128, 192, 288)
CHOICES = group_choices({f"layer{i}": 1152 for i in range(6)}, SIZES)  # 15625 configurations
SHAPES = {name: (1152 * (1 + i % 4), 1152) for i, name in enumerate(CHOICES)}
UNIFORM = dict.fromkeys(CHOICES, 128)
BUDGET = Budget(
    population=20,
    parents=6,
    crossovers=8,
    mutations=8,
    probability=0.2,
    rounds=15,
    seed=0,
)
SHORT = replace(BUDGET, rounds=5)
CONSTRAINTS = {
    "mean": mean_at_least(128),
    "bit_ops": bit_ops_at_most(bit_ops(UNIFORM, SHAPES, 4, 8), SHAPES, 4, 8),
}

BLOCK_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def anything(groups):
    return True


def separable(seed=0):
    """A loss per layer and size, drawn at random and so not monotone in the size, summed."""
    chance = random.Random(seed)
    table = {(name, size): chance.random() for name, sizes in CHOICES.items() for size in sizes}
    return lambda groups: sum(table[item] for item in groups.items())


class Recorded:
    """An objective that remembers what it was asked, and stops before call ``last``."""

    def __init__(self, objective, last=math.inf):
        self.objective, self.last, self.asked = objective, last, []

    def __call__(self, groups):
        if len(self.asked) >= self.last:
            raise KeyboardInterrupt
        self.asked.append(tuple(groups.items()))
        return self.objective(groups)


def test_choices_divide_the_width():
    widths = {"fc2": 4608, "qkv": 1152, "small": 128, "odd": 100, "fifty": 96}
    assert group_choices(widths, (288, 32, 64, 128, 192, 32)) == {
        "fc2": SIZES,
        "qkv": SIZES,
        "small": (32, 64, 128),
        "odd": (100,),
        "fifty": (32,),
    }


def test_bit_operations_by_hand():
    groups = {"a": 32, "b": 128}
    shapes = {"a": (10, 64), "b": (3, 128)}
    expected = 10 * 64 * 4 * 8 + 10 * 2 * 1024 + 3 * 128 * 4 * 8 + 3 * 1 * 1024
    assert bit_ops(groups, shapes, 4, 8) == expected
    assert bit_ops_at_most(expected, shapes, 4, 8)(groups)
    assert not bit_ops_at_most(expected - 1, shapes, 4, 8)(groups)
    assert mean_group_size(groups) == 80
    assert mean_at_least(80)(groups)
    assert not mean_at_least(80.5)(groups)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("seed", range(3))
def test_evaluates_only_what_is_allowed_and_nothing_twice(constraint, seed):
    allowed, objective = CONSTRAINTS[constraint], Recorded(separable())
    result = evolve(CHOICES, objective, allowed, replace(BUDGET, seed=seed))
    assert all(allowed(dict(groups)) for groups in objective.asked)
    assert len(set(objective.asked)) == len(objective.asked) == BUDGET.population * BUDGET.rounds
    losses = [separable()(dict(groups)) for groups in objective.asked]
    assert result.loss == min(losses) == separable()(result.groups)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum(constraint, seed):
    allowed, objective = CONSTRAINTS[constraint], separable(seed)
    every = (dict(zip(CHOICES, sizes)) for sizes in itertools.product(*CHOICES.values()))
    optimum = min(filter(allowed, every), key=objective)
    result = evolve(CHOICES, objective, allowed, replace(BUDGET, rounds=30, seed=seed))
    assert result.groups == optimum


def test_seed_decides():
    first, second, other = Recorded(separable()), Recorded(separable()), Recorded(separable())
    result = evolve(CHOICES, first, CONSTRAINTS["mean"], BUDGET)
    assert evolve(CHOICES, second, CONSTRAINTS["mean"], BUDGET) == result
    evolve(CHOICES, other, CONSTRAINTS["mean"], replace(BUDGET, seed=1))
    assert first.asked == second.asked != other.asked


def test_history_tells_of_every_round():
    objective = Recorded(separable())
    result = evolve(CHOICES, objective, CONSTRAINTS["mean"], BUDGET)
    losses = np.array([separable()(dict(groups)) for groups in objective.asked])
    losses = losses.reshape(BUDGET.rounds, -1)
    assert [r.mean for r in result.history] == pytest.approx(losses.mean(1))
    assert [r.best for r in result.history] == np.minimum.accumulate(losses.min(1)).tolist()
    assert result.history[-1].mean < result.history[0].mean


def test_children_descend_from_the_best():
    def loss(groups):
        return separable()(dict(groups))

    objective = Recorded(separable())
    crossing = replace(BUDGET, parents=4, crossovers=10, mutations=0, population=30, rounds=2)
    evolve(CHOICES, objective, anything, crossing)
    parents = sorted(objective.asked[:30], key=loss)[:4]
    couples = list(itertools.combinations(parents, 2))
    for child in objective.asked[30:40]:
        assert any(descends(child, couple) for couple in couples)

    objective = Recorded(separable())
    mutating = replace(BUDGET, parents=1, crossovers=0, mutations=20, probability=0.1, rounds=2)
    evolve(CHOICES, objective, anything, mutating)
    best = min(objective.asked[:20], key=loss)
    changes = [len(set(child) - set(best)) for child in objective.asked[20:]]
    assert min(changes) == 1 and np.mean(changes) < 2


def descends(child, couple) -> bool:
    """Whether every layer's group size is that of one of the parents."""
    return all(pair in pairs for pair, pairs in zip(child, zip(*couple)))


def test_no_uniform_allocation_is_better():
    objective = Recorded(lambda groups: sum((size - 128) ** 2 for size in groups.values()))
    result = evolve(CHOICES, objective, CONSTRAINTS["mean"], replace(BUDGET, rounds=1))
    assert result.groups == UNIFORM
    assert objective.asked[0] == tuple(dict.fromkeys(CHOICES, 288).items())


def test_a_tight_constraint_still_fills_the_population():
    """Seven of 15625 configurations have a mean this high."""
    objective = Recorded(separable())
    evolve(CHOICES, objective, mean_at_least(272), replace(BUDGET, rounds=1))
    largest = dict.fromkeys(CHOICES, 288)
    expected = [largest] + [{**largest, name: 192} for name in CHOICES]
    assert {frozenset(groups) for groups in objective.asked} == {
        frozenset(groups.items()) for groups in expected
    }


@pytest.mark.parametrize("choices", [
    {"a": (64,)},
    {"a": (64,), "b": (100,)},
    {"a": (32, 64)},
    {"a": (32, 64, 128), "b": (32, 64)},
])
def test_tiny_spaces_are_searched_whole(tmp_path, choices):
    objective = Recorded(lambda groups: sum(groups.values()))
    result = evolve(choices, objective, anything, BUDGET, tmp_path / "history.json")
    existing = math.prod(len(sizes) for sizes in choices.values())
    assert len(set(objective.asked)) == len(objective.asked) == existing
    assert result.groups == {name: min(sizes) for name, sizes in choices.items()}
    assert len(result.history) == 1


def test_an_impossible_constraint_is_refused():
    objective = Recorded(separable())
    with pytest.raises(ValueError, match="not even the largest of every layer"):
        evolve(CHOICES, objective, mean_at_least(289), BUDGET)
    assert not objective.asked


@pytest.mark.parametrize("change, message", [
    ({"population": 0}, "at least 1"),
    ({"rounds": 0}, "at least 1"),
    ({"parents": 0}, "at least 1"),
    ({"mutations": -1}, "at least 0"),
    ({"crossovers": 15}, "exceed a population of 20"),
    ({"probability": 1.5}, "expected 0 to 1"),
    ({"probability": math.nan}, "expected 0 to 1"),
])
def test_a_budget_that_does_not_add_up_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BUDGET, **change)


def test_a_loss_that_is_no_number_is_refused(tmp_path):
    path = tmp_path / "history.json"
    with pytest.raises(ValueError, match=r"the loss of group sizes \(288, .* is nan"):
        evolve(CHOICES, lambda groups: math.nan, CONSTRAINTS["mean"], BUDGET, path)
    assert json.loads(path.read_text())["evaluated"] == []


@pytest.mark.parametrize("stops", [(0,), (1,), (19,), (20,), (21,), (57, 3, 0, 20)])
def test_an_interrupted_run_continues(tmp_path, stops):
    path, asked = tmp_path / "history.json", []
    whole = Recorded(separable())
    expected = evolve(CHOICES, whole, CONSTRAINTS["mean"], SHORT)
    for last in stops:
        objective = Recorded(separable(), last)
        with pytest.raises(KeyboardInterrupt):
            evolve(CHOICES, objective, CONSTRAINTS["mean"], SHORT, path)
        asked += objective.asked
    objective = Recorded(separable())
    assert evolve(CHOICES, objective, CONSTRAINTS["mean"], SHORT, path) == expected
    assert asked + objective.asked == whole.asked
    # The file is complete now: a further call asks nothing.
    silent = Recorded(separable(), 0)
    assert evolve(CHOICES, silent, CONSTRAINTS["mean"], SHORT, path) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]


VICTIM = """
import sys, time
from pathlib import Path
from test_evolution import SHORT, CHOICES, CONSTRAINTS, separable
from quant.refinement.evolution import evolve

def objective(groups):
    with open(sys.argv[2], "a") as log:
        print(*groups.values(), file=log)
    time.sleep(0.005)
    return separable()(groups)

evolve(CHOICES, objective, CONSTRAINTS["bit_ops"], SHORT, Path(sys.argv[1]))
"""


def test_a_killed_process_continues(tmp_path):
    path, log = tmp_path / "history.json", tmp_path / "asked.txt"
    root = Path(__file__).parents[1]
    python_path = f"{root}{os.pathsep}{root / 'tests'}"
    run = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(path), str(log)],
        stderr=subprocess.DEVNULL,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path},
    )
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 35:
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.002)
    run.kill()
    assert run.wait(20) == -signal.SIGKILL
    lines = log.read_text().splitlines()
    asked = [tuple(zip(CHOICES, map(int, line.split()))) for line in lines]
    whole, objective = Recorded(separable()), Recorded(separable())
    expected = evolve(CHOICES, whole, CONSTRAINTS["bit_ops"], SHORT)
    assert evolve(CHOICES, objective, CONSTRAINTS["bit_ops"], SHORT, path) == expected
    saved = len(whole.asked) - len(objective.asked)
    # Only the evaluation that was under way is lost.
    assert len(asked) - 1 <= saved <= len(asked)
    assert asked == whole.asked[:len(asked)]
    assert objective.asked == whole.asked[saved:]


def test_a_file_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "history.json"
    arguments = {
        "choices": CHOICES,
        "allowed": CONSTRAINTS["mean"],
        "budget": replace(BUDGET, rounds=1),
        "history_path": path,
        "fingerprint_text": "DiT-Digits, FID",
    }
    evolve(loss_of=separable(), **arguments)
    before = path.read_bytes()
    swapped = dict(reversed(CHOICES.items()))
    for change, message in [
        ({"budget": BUDGET}, "rounds is 1 there, 15 now"),
        ({"fingerprint_text": "DiT-XL/2"}, "about is 'DiT-Digits, FID' there"),
        ({"choices": {**CHOICES, "more": (64,)}}, "other layers or group sizes"),
        ({"choices": swapped}, "other layers"),
    ]:
        objective = Recorded(separable())
        with pytest.raises(ValueError, match=f"{message}.*or delete it to start anew"):
            evolve(loss_of=objective, **{**arguments, **change})
        assert not objective.asked
        assert path.read_bytes() == before


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "history.json"
    evolve(CHOICES, separable(), CONSTRAINTS["mean"], SHORT, path)
    text = path.read_text()
    sound = json.loads(text)
    number, loss, sizes = sound["evaluated"][0]
    damaged_texts = [text[:len(text) // 2], "", "null", "[]", "{}", "[" * 100000, b"\x80\x04\xff"]
    damaged_rows = [
        [number, loss, sizes[1:]],
        [number, loss, [96, *sizes[1:]]],
        [number, math.nan, sizes],
        [number, "low", sizes],
        [number, None, sizes],
        ["1", loss, sizes],
        [loss, sizes],
        [number, loss, 5],
        [number, loss, [[32]] * 6],
        7,
    ]
    damaged = [{**sound, "evaluated": [row]} for row in damaged_rows]
    damaged += [{**sound, "evaluated": None}, {**sound, "more": 1}]
    for content in damaged_texts + [json.dumps(entries) for entries in damaged]:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        objective = Recorded(separable())
        with pytest.raises(ValueError, match="is damaged: give another file, or delete it"):
            evolve(CHOICES, objective, CONSTRAINTS["mean"], SHORT, path)
        assert not objective.asked, content


def test_a_file_that_cannot_be_written_is_refused_before_the_first_evaluation(tmp_path):
    objective = Recorded(separable())
    nowhere = tmp_path / "nowhere" / "history.json"
    with pytest.raises(ValueError, match="cannot write .*No such file or directory"):
        evolve(CHOICES, objective, CONSTRAINTS["mean"], SHORT, nowhere)
    with pytest.raises(ValueError, match="cannot read .*Is a directory"):
        evolve(CHOICES, objective, CONSTRAINTS["mean"], SHORT, tmp_path)
    assert not objective.asked


@pytest.mark.parametrize("blocks", [1, 28])
def test_figure_of_a_search(blocks):
    def draw(groups):
        places = {name: single(name, name.split(".")[3], name.rsplit(".", 2)[0]) for name in groups}
        png = figures.group_allocation([3.0, 2.0, 2.0], [4.0, 3.0, 2.5], groups, places)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    chance = random.Random(0)
    names = [f"blocks.{i}.{kind}" for i in range(blocks) for kind in BLOCK_LINEARS]
    various = draw({name: chance.choice(SIZES) for name in names})
    uniform = draw(dict.fromkeys(names, 64))
    assert various.shape == uniform.shape
    assert (various != uniform).any()
