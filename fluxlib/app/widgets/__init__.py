"""What people touch and watch: live progress of a run, and the dashboard of ``notebooks/explore.ipynb``."""

from fluxlib.app.widgets.background import HEADLESS, BackgroundRun, RunMonitor, in_notebook
from fluxlib.app.widgets.dashboard import Dashboard
from fluxlib.app.widgets.preview import Preview, preview
