"""Reports of a run for people: terminal table, sentences, heat map, HTML page."""

from fastsafe.audit.report.heatmap import heatmap_svg
from fastsafe.audit.report.html import report_html
from fastsafe.audit.report.quotes import quotes
from fastsafe.audit.report.table import table_text, tables
from fastsafe.audit.report.words import sentences

__all__ = ["heatmap_svg", "quotes", "report_html", "sentences", "table_text", "tables"]
