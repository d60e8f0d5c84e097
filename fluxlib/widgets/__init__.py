"""What people touch and watch: live progress of a run, and the dashboard of ``notebooks/explore.ipynb``.

- :mod:`fluxlib.widgets.monitor` -- a line per round and a growing curve, in any notebook
- :mod:`fluxlib.widgets.preview` -- what a configuration would do, before it is run
- :mod:`fluxlib.widgets.forecast` -- the memory, work and time of it
- :mod:`fluxlib.widgets.background` -- a run in a thread: watched, stopped, gone on with
- :mod:`fluxlib.widgets.controls` -- sliders and menus, and the configuration that they stand for
- :mod:`fluxlib.widgets.history` -- earlier runs in the store, to choose from
- :mod:`fluxlib.widgets.wording` -- what is said of a run, as HTML
- :mod:`fluxlib.widgets.dashboard` -- all of it in one place
"""

from fluxlib.widgets.background import BackgroundRun
from fluxlib.widgets.dashboard import Dashboard
from fluxlib.widgets.monitor import HEADLESS, RunMonitor, in_notebook
from fluxlib.widgets.preview import Preview, preview

__all__ = ["HEADLESS", "BackgroundRun", "Dashboard", "Preview", "RunMonitor", "in_notebook", "preview"]
