"""The geometry of the loss around a training's weights: measured, and logged."""
