"""The report's style sheet: one page, light and dark, nothing loaded from anywhere."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1c1d22; --soft: #62656f; --line: #e3e4e8;
  --good: #0b7a4b; --good-paper: #e2f4ea; --bad: #b3261e; --bad-paper: #fbe6e4; --neutral-paper: #eceef2;
  --before: #d9480f; --after: #1a66d6;
  --c0: #1a66d6; --c1: #d9480f; --c2: #0b8a5a; --c3: #8a3ffc; --c4: #b58900; --c5: #c2255c;
  --c6: #0c8599; --c7: #5c5f66; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #141519; --card: #1c1e24; --ink: #eceded; --soft: #a0a4b0; --line: #33363f;
  --good: #5fd39a; --good-paper: #14352a; --bad: #ff8a80; --bad-paper: #43201f; --neutral-paper: #2a2d35;
  --before: #ff8f5c; --after: #6ea8ff;
  --c0: #6ea8ff; --c1: #ff8f5c; --c2: #5fd39a; --c3: #c0a0ff; --c4: #e6c34d; --c5: #ff85ad;
  --c6: #5cd0e0; --c7: #a9adb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 44px 0 4px; }
h3 { font-size: 14px; margin: 18px 0 2px; }
p { margin: 4px 0 12px; max-width: 78ch; }
.soft, figcaption { color: var(--soft); }
.verdict { display: inline-block; margin: 0 0 10px; padding: 3px 12px; border-radius: 999px; font-weight: 600;
  background: var(--neutral-paper); }
.verdict.pass { color: var(--good); background: var(--good-paper); }
.verdict.miss { color: var(--bad); background: var(--bad-paper); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 20px 0 8px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 26px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; display: block; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; font-size: 14px; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 600; }
thead th { font-size: 13px; }
tbody th { font-weight: 400; color: var(--soft); text-align: left; white-space: nowrap; }
.checks th:nth-child(2), th:first-child, .left td, .left th { text-align: left; }
td.pass::after { content: " \\2713"; color: var(--good); font-weight: 700; }
td.miss { color: var(--bad); font-weight: 600; }
td.miss::after { content: " \\2717"; }
.left td { overflow-wrap: anywhere; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 12px; margin: 12px 0; }
.grid.two { grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); }
figure { margin: 12px 0; }
figcaption { font-size: 13px; margin: 0 0 6px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 8px; }
.card > svg { display: block; width: 100%; height: auto; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 14px;
  background: currentColor; vertical-align: -1px; }
.legend { font-size: 13px; margin: 6px 0; }
.legend .key:first-child { margin-left: 0; }
.legend .cellkey { padding: 2px 7px; font-size: 12px; }
svg text { font-family: inherit; fill: var(--ink); }
svg .title { font-size: 12.5px; font-weight: 600; }
svg .tick { font-size: 10.5px; fill: var(--soft); }
svg .label { font-size: 11px; fill: var(--soft); }
svg .grid { stroke: var(--line); fill: none; }
svg .axis { stroke: var(--soft); fill: none; }
svg .line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg .thin { stroke-width: 1; stroke-dasharray: 3 3; }
svg .diagonal { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; }
svg .dot { fill: currentColor; }
svg .band { fill: currentColor; opacity: 0.13; }
svg .bars { stroke: currentColor; fill: none; }
svg .steps { stroke: currentColor; stroke-width: 1.5; fill: currentColor; fill-opacity: 0.1; }
svg .cloud { stroke: currentColor; stroke-width: 2.6; stroke-linecap: round; stroke-opacity: 0.35; fill: none; }
svg .cell text { font-size: 10.5px; fill: currentColor; }
svg .cell rect { stroke: var(--card); stroke-width: 1; fill: var(--cell); }
.cellkey { background: var(--cell); }
.before { color: var(--before); } .after { color: var(--after); }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); }
.s4 { color: var(--c4); } .s5 { color: var(--c5); } .s6 { color: var(--c6); } .s7 { color: var(--c7); }
.h0 { --cell: #7f0f1d; color: #fff; } .h1 { --cell: #c0392b; color: #fff; }
.h2 { --cell: #e67e4b; color: #1c1d22; } .h3 { --cell: #f5c189; color: #1c1d22; }
.h4 { --cell: #e4e6e9; color: #1c1d22; }
.h5 { --cell: #b4d0ee; color: #1c1d22; } .h6 { --cell: #6fa5dc; color: #1c1d22; } .h7 { --cell: #2a6bb8; color: #fff; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } .card, .scroll { break-inside: avoid; } }
"""
