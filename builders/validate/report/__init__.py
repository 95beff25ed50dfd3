"""Write validations as one self-contained HTML page, and as JSON."""

from builders.validate.report.files import write_json, write_report

__all__ = ["write_json", "write_report"]
