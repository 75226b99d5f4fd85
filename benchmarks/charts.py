"""How charts look: pygal, with what all pictures have in common."""

import sys
from typing import Any

import pygal
from pygal.style import Style

# It looks for plugins, of which there are none here, in a way that makes Python 3.11 warn at every import from now on.
sys.meta_path[:] = [
    finder for finder in sys.meta_path if type(finder).__name__ != "PluginImportFixer"
]

XY = pygal.XY

# Readable on a light and on a dark page: the picture brings its own ground.
STYLE = Style(
    background="#ffffff",
    plot_background="#ffffff",
    foreground="#333333",
    foreground_strong="#111111",
    foreground_subtle="#999999",
    font_family="Helvetica, Arial, sans-serif",
    title_font_size=18,
    label_font_size=13,
    major_label_font_size=13,
    legend_font_size=14,
    opacity=1,
    guide_stroke_color="#dddddd",
    major_guide_stroke_color="#cccccc",
    # Told apart by those who see no red or green, too.
    colors=("#0072b2", "#d55e00", "#777777", "#009e73"),
    stroke_width=2.5,
)


def chart(title: str, **options: Any) -> pygal.XY:
    """An empty chart of points and lines, 800 by 420 pixels."""
    made = pygal.XY(
        **{
            "title": title,
            "style": STYLE,
            "width": 800,
            "height": 420,
            "legend_at_bottom": True,
            "legend_at_bottom_columns": 3,
            "truncate_legend": -1,
            "dots_size": 4,
            "margin_right": 40,
            "show_x_guides": True,
            "value_formatter": lambda y: f"{y:,.10g}",
            # A file that needs nothing from elsewhere and is the same for the same figures.
            "js": (),
            "disable_xml_declaration": True,
            "pretty_print": False,
            **options,
        }
    )
    # Its prefix in the style sheet, at random otherwise.
    made.uuid = "picture"
    return made
