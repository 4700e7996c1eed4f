"""The calibration trajectory: the calls of the model, and what observers see of them."""
