"""Write validations, and the plan of a search, as one self-contained HTML page each; validations as JSON, too."""

from builders.validate.report.files import check_report, read_report, write_json, write_plan_page, write_report

__all__ = ["check_report", "read_report", "write_json", "write_plan_page", "write_report"]
