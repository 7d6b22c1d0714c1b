"""An outcome -> reports: JUnit XML, JSON, Markdown, one page of HTML that loads nothing.

To be written.
"""
