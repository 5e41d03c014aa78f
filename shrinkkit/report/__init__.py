"""The report: tables, pictures, HTML, Markdown and PDF."""
