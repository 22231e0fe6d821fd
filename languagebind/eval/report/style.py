"""The page's style sheet: light or dark as the reader's system is, light on paper."""

LIGHT = """
--paper: #ffffff; --ink: #1b1f24; --faint: #59636e; --rule: #d1d9e0; --panel: #f6f8fa; --accent: #1f6fb5;
--on-accent: #ffffff; --warn: #9a3412; --heat: #0b4f8a; --c0: #1f6fb5; --c1: #c2410c; --c2: #15803d; --c3: #9333a8;
color-scheme: light;
"""
DARK = """
--paper: #14171b; --ink: #e6e9ec; --faint: #9aa5b1; --rule: #363d45; --panel: #1d2127; --accent: #6cb0f0;
--on-accent: #0b1420; --warn: #fdba74; --heat: #6cb0f0; --c0: #6cb0f0; --c1: #fb923c; --c2: #4ade80; --c3: #d58cf0;
color-scheme: dark;
"""
RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.35rem; margin: 2.6rem 0 .3rem;
  border-top: 2px solid var(--rule); padding-top: 1.2rem; } h3 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
h2, h3, h4, td, th, figcaption, dd, summary { overflow-wrap: break-word; }
a { color: var(--accent); }
.lead, .meaning { color: var(--faint); }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding: .2rem 0; }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  min-width: 5.5rem; }
thead th { border-bottom: 2px solid var(--rule); vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 9rem; }
td { overflow-wrap: anywhere; }
.range { display: block; color: var(--faint); font-size: .82em; white-space: nowrap; }
.best { font-weight: 700; } .published { min-width: 12rem; }
summary { cursor: pointer; color: var(--accent); margin: .5rem 0; }
figure { margin: .6rem 0; } figcaption { color: var(--faint); }
svg { display: block; } svg text { fill: var(--ink); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .axis { fill: var(--faint); font-size: 11px; } svg .axis-title { fill: var(--faint); font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.chance { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 3 3; }
.bar { fill: var(--accent); } .heat { fill: var(--heat); } .frame { fill: none; stroke: var(--rule); }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 5px; }
svg .count { font-size: 10.5px; } svg .strong { fill: var(--on-accent); }
.line { fill: none; stroke-width: 2; } .dashed { stroke-dasharray: 7 4; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .dot.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .dot.c2 { fill: var(--c2); }
.dot.c3 { fill: var(--c3); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1rem; padding: 0; margin: 0;
  list-style: none; }
.cards li { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .7rem;
  break-inside: avoid; }
.thumbnail { margin-bottom: .5rem; } .thumbnail img { display: block; width: 100%; height: 170px; object-fit: contain; }
.meaning { display: block; font-size: .8rem; line-height: 1.3; margin-top: .2rem; }
.placeholder { min-height: 170px; display: flex; align-items: center; border: 1px dashed var(--rule); padding: .6rem;
  color: var(--faint); font-size: .85rem; overflow-wrap: anywhere; } .placeholder p { margin: 0; }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .1rem .7rem; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
"""
STYLE = f""":root {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
{RULES}
@media print {{ :root {{ {LIGHT} }} body {{ max-width: none; padding: 0; font-size: 11px; }}
  .scroll {{ overflow: visible; }} svg {{ max-width: 100%; height: auto; }} tr, figure {{ break-inside: avoid; }}
  h2, h3, h4, .lead, caption {{ break-after: avoid; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}"""
