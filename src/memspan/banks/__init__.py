"""Networks with a learned memory inside.

- :mod:`memspan.banks.temporal`: memory-based dynamic graph networks (TGN, JODIE, APAN) over streams of
  interactions, with what a larger batch costs them and what helps (PRES, a scaled learning rate, rules).
"""
