"""What people touch and watch: live progress of a run, and the dashboard of ``notebooks/explore.ipynb``.

- :mod:`fluxlib.app.widgets.background` -- a run watched in any notebook, or in a thread: stopped, gone on with
- :mod:`fluxlib.app.widgets.preview` -- what a configuration would do, before it is run; its memory, work and time
- :mod:`fluxlib.app.widgets.controls` -- sliders and menus, and the configuration that they stand for
- :mod:`fluxlib.app.widgets.history` -- earlier runs to choose from, and what is said of runs, as HTML
- :mod:`fluxlib.app.widgets.dashboard` -- all of it in one place
"""

from fluxlib.app.widgets.background import HEADLESS, BackgroundRun, RunMonitor, in_notebook
from fluxlib.app.widgets.dashboard import Dashboard
from fluxlib.app.widgets.preview import Preview, preview
