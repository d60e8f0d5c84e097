"""Figures: pure functions from a tidy table to a picture, one per figure, named after it; nothing is simulated here."""

from fluxlib.figures import claims, dashboard, merging, overhead, profiling, race, real_models, roles
from fluxlib.figures.picture import Picture, save
