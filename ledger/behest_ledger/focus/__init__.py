"""FOCUS, the FinOps Open Cost and Usage Specification (https://focus.finops.org): the bill in the form that tools of
finance read.

`columns.py` says which columns there are in which version, `rows.py` what stands in them, `csv_file.py` and
`parquet_file.py` how they are written. Everything is exact: amounts are integers until they are written as decimals.
"""
