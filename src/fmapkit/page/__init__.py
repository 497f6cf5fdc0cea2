"""A page to share: one self-contained HTML file of maps and analyses.

What `maps.to_html(path)` and `stats.to_html(path)` call. The file needs nothing beside it, loads
nothing, and runs in any browser of the last years (Chrome 80, Firefox 113, Safari 16.4).
"""

from fmapkit.page.document import PageMaps as PageMaps
from fmapkit.page.document import write_analysis as write_analysis
from fmapkit.page.document import write_maps as write_maps
from fmapkit.page.panels import Fact as Fact
from fmapkit.page.panels import Panel as Panel
from fmapkit.page.panels import Section as Section
from fmapkit.page.panels import number_panel as number_panel
