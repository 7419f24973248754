"""Reproduction of published tables: data, protocol, runs, evaluation, table, plots."""
