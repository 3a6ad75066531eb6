"""What comes in: photos, dates, phrases, and text of any size.

The lessons use it, and it uses no lesson. Read a file here when a chapter names it.
"""
