"""The page's style sheet: light or dark as the reader's system is, light on paper.

--c0 to --c7 are the colours of lines, the most different first: told apart with each kind of colour blindness too
(by the simulation of Machado et al., 2009), and at least three times as light or dark as the paper.
"""

LIGHT = """
--paper: #ffffff; --ink: #1b1f24; --faint: #59636e; --rule: #d1d9e0; --panel: #f6f8fa; --accent: #1f6fb5;
--on-accent: #ffffff; --warn: #9a3412; --heat: #0b4f8a;
--c0: #1f6fb5; --c1: #be821e; --c2: #6e1e46; --c3: #321e96; --c4: #aa460a; --c5: #966efa; --c6: #5a0ae6; --c7: #0a9696;
color-scheme: light;
"""
DARK = """
--paper: #14171b; --ink: #e6e9ec; --faint: #9aa5b1; --rule: #363d45; --panel: #1d2127; --accent: #6cb0f0;
--on-accent: #0b1420; --warn: #fdba74; --heat: #6cb0f0;
--c0: #6cb0f0; --c1: #e6820a; --c2: #d2e6aa; --c3: #966eaa; --c4: #82e632; --c5: #e6465a; --c6: #0a82fa; --c7: #e696aa;
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
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 3rem); }
th, td { border-bottom: 1px solid var(--rule); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  min-width: 5.5rem; }
thead th { border-bottom: 2px solid var(--rule); vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 9rem; position: sticky; left: 0; background: var(--paper); }
td { overflow-wrap: anywhere; }
.range { display: block; color: var(--faint); font-size: .82em; white-space: nowrap; }
.best { font-weight: 700; } .number { text-align: right; white-space: nowrap; } th .number { font-weight: inherit; }
.caveat { display: block; color: var(--warn); font-size: .82em; line-height: 1.3; }
.headline tbody th { min-width: 11rem; max-width: 16rem; } .headline td { min-width: 7.6rem; }
.headline :is(th, td):is(:nth-child(2), :nth-child(3)) { min-width: 4.4rem; padding-right: 1.2rem; }
.published { min-width: 14rem; font-size: .92em; } .published div { padding-left: 3.7em; text-indent: -3.7em; }
.published summary { margin: .1rem 0; }
.origin { color: var(--faint); font-size: .82rem; margin: -.6rem 0 .6rem; overflow-wrap: anywhere; }
.origin span { display: inline-block; margin-right: 1.5rem; }
.cautions { grid-template-columns: minmax(6rem, auto) minmax(0, 1fr); gap: .5rem 1.2rem; }
.cautions dt { font-weight: 500; color: var(--ink); overflow-wrap: anywhere; max-width: 14rem; }
.cautions ul { margin: 0; padding-left: 1.1rem; }
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
.line { stroke: var(--c); } .dot { fill: var(--c); }
.dot.hollow { fill: var(--paper); stroke: var(--c); stroke-width: 1.6; }
COLOURS
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1rem; padding: 0; margin: 0;
  list-style: none; }
.cards li { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .7rem;
  break-inside: avoid; }
.thumbnail { margin-bottom: .5rem; } .thumbnail img { display: block; width: 100%; height: 170px; object-fit: contain; }
.both { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
.both .thumbnail img { height: 110px; } .both .placeholder { min-height: 110px; }
.meaning { display: block; font-size: .8rem; line-height: 1.3; margin-top: .2rem; }
.placeholder { min-height: 170px; display: flex; align-items: center; border: 1px dashed var(--rule); padding: .6rem;
  color: var(--faint); font-size: .85rem; overflow-wrap: anywhere; } .placeholder p { margin: 0; }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .1rem .7rem; margin: 0; }
dt { color: var(--faint); } .cards dt { max-width: 5.5rem; } .cards dl { font-size: .9rem; line-height: 1.4; }
.path { font-size: .92em; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 600px) { body { padding: 1rem; }
  .headline tbody th { min-width: 6.5rem; max-width: 6.5rem; position: static; }
  .headline :is(th, td):is(:nth-child(2), :nth-child(3)) { min-width: 3.5rem; padding-right: .8rem; }
  .headline .number { white-space: normal; } .cautions dt { margin-top: .5rem; }
  h2, h3 { overflow-wrap: anywhere; } .cautions { grid-template-columns: minmax(0, 1fr); gap: .2rem; } }
""".replace("COLOURS", " ".join(f".c{k} {{ --c: var(--c{k}); }}" for k in range(8)))
STYLE = f""":root {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
{RULES}
@media print {{ :root {{ {LIGHT} }} body {{ max-width: none; padding: 0; font-size: 11px; }}
  .scroll {{ overflow: visible; }} svg {{ max-width: 100%; height: auto; }} tr, figure {{ break-inside: avoid; }}
  h2, h3, h4, .lead, caption {{ break-after: avoid; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }} }}"""
