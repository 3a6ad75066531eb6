"""What comes in: photos, dates, phrases, text of any size, documents, and published models.

The lessons use it, and it uses no lesson. Read a file here when a chapter names it.
"""
