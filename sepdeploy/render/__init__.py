"""Turns reports, plans and measurements into terminal tables and HTML; it returns text and never prints."""
