"""JSON Schemas of the records that the commands write."""
