"""What smoothing does to inputs, weights and second moments, against closed forms."""
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from quant.numerics.smoothing import NO_SMOOTHING, Smoothing

FACTORS = torch.tensor([0.5, 2.0, 4.0])  # powers of two: dividing by them is exact
SHIFT = torch.tensor([1.0, -3.0, 0.25])
INPUT = torch.tensor([[1.0, 5.0, -2.0], [0.0, 7.0, 8.0]])


def test_inputs_are_shifted_then_divided():
    both = torch.tensor([[4.0, 1.0, -0.4375], [2.0, 2.0, 2.0625]])
    divided = torch.tensor([[2.0, 2.5, -0.5], [0.0, 3.5, 2.0]])
    shifted = torch.tensor([[2.0, 2.0, -1.75], [1.0, 4.0, 8.25]])
    assert torch.equal(Smoothing(FACTORS, SHIFT).of_input(INPUT), both)
    assert torch.equal(Smoothing(FACTORS).of_input(INPUT), divided)
    assert torch.equal(Smoothing(shift=SHIFT).of_input(INPUT), shifted)


def test_weights_are_multiplied_column_by_column():
    weight = torch.tensor([[1.0, 1.0, 1.0], [2.0, -3.0, 0.5]])
    expected = torch.tensor([[0.5, 2.0, 4.0], [1.0, -6.0, 2.0]])
    assert torch.equal(Smoothing(FACTORS, SHIFT).of_weight(weight), expected)


def test_the_moment_is_that_of_the_divided_inputs():
    moment = INPUT.T @ INPUT
    divided = INPUT / FACTORS
    assert torch.equal(Smoothing(FACTORS).of_moment(moment), divided.T @ divided)


def test_the_product_stays_the_same():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 16, generator=generator)
    weight = torch.randn(5, 16, generator=generator)
    smoothing = Smoothing(torch.rand(16, generator=generator) + 0.1)
    product = smoothing.of_input(x).double() @ smoothing.of_weight(weight).double().T
    assert np.allclose(product, x.double() @ weight.double().T, atol=1e-5)


def test_the_inputs_themselves_stay_as_they_are():
    x, weight, moment = INPUT.clone(), INPUT.clone(), torch.eye(3)
    smoothing = Smoothing(FACTORS, SHIFT)
    smoothing.of_input(x)
    smoothing.of_weight(weight)
    smoothing.of_moment(moment)
    assert torch.equal(x, INPUT)
    assert torch.equal(weight, INPUT)
    assert torch.equal(moment, torch.eye(3))


def test_no_smoothing_hands_on_what_it_gets():
    x, moment = INPUT.clone(), torch.eye(3)
    assert NO_SMOOTHING.of_input(x) is x
    assert NO_SMOOTHING.of_weight(x) is x
    assert NO_SMOOTHING.of_moment(moment) is moment


@pytest.mark.parametrize("smoothing, expected", [
    (NO_SMOOTHING, True),
    (Smoothing(alpha=0.5, losses=torch.zeros(3)), True),
    (Smoothing(FACTORS), False),
    (Smoothing(shift=SHIFT), False),
    (Smoothing(torch.ones(3)), False),  # ones are factors too: nobody compares them
])
def test_absence_is_the_absence_of_factors_and_shift(smoothing, expected):
    assert smoothing.is_none is expected


def test_it_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        NO_SMOOTHING.factors = FACTORS
