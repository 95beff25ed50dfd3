"""Write validations as one self-contained HTML page, and as JSON."""

from builders.validate.report.files import check_report, read_report, write_json, write_report

__all__ = ["check_report", "read_report", "write_json", "write_report"]
