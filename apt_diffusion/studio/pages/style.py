"""How the pages look: system fonts (nothing is fetched from elsewhere), and colours that follow light and dark."""

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """Colours, sizes and fonts of all pages."""
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="lg", font=SANS, font_mono=MONO
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_title_text_weight="600",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        # The theme's own grays are too pale to be read by everybody (WCAG AA asks for 4.5 : 1).
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_label_text_weight="500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        slider_color="*primary_600",
    )


CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; width: 100%; }
.gradio-container .main, .gradio-container .wrap > .column { width: 100%; }
.apt-header h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.02em; }
.apt-header p { margin: 0.15rem 0 0; color: var(--body-text-color-subdued); }
.apt-columns { gap: 1.25rem; align-items: flex-start; }
.apt-small img { image-rendering: pixelated; }
#ask-picture img, #class-picture img { width: 100%; height: 100%; object-fit: contain; }
.apt-pictures .grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
.apt-pictures > label[data-testid="block-label"] { position: static; border: none; background: none; }
.apt-pictures .grid-container { padding-top: 0 !important; }
.apt-pictures .caption-label { font-size: 0.72rem; padding: 0.05rem 0.4rem; }
.apt-pictures .empty { min-height: 9rem; height: auto; }
.apt-wide .thumbnail-item { aspect-ratio: auto !important; height: auto !important; }
.apt-inline { flex-grow: 0 !important; min-width: max-content !important; align-self: center; }
.html-container:has(.apt-status, .apt-bars, .apt-curve) { padding: 0; }
.apt-help { margin-top: -0.4rem; }
.apt-examples .apt-help { margin-top: 0; }
.apt-help .html-container { padding: 0 0.15rem; }
.apt-help p { margin: 0; font-size: var(--block-info-text-size); color: var(--body-text-color-subdued); }
.apt-examples { align-items: center; gap: 0.5rem; }

.apt-status { display: flex; flex-direction: column; gap: 0.4rem; min-height: 2.4rem; padding: 0.55rem 0.8rem;
  border-radius: var(--radius-lg); border: 1px solid var(--border-color-primary);
  background: var(--block-background-fill); color: var(--body-text-color); justify-content: center; }
.apt-status progress { width: 100%; height: 0.45rem; appearance: none; border: none; border-radius: 0.25rem;
  overflow: hidden; background: var(--neutral-200); }
.apt-status progress::-webkit-progress-bar { background: var(--neutral-200); }
.apt-status progress::-webkit-progress-value { background: var(--primary-600); transition: width 0.2s; }
.apt-status progress::-moz-progress-bar { background: var(--primary-600); }
.dark .apt-status progress, .dark .apt-status progress::-webkit-progress-bar { background: var(--neutral-700); }
.apt-columns button.lg { white-space: nowrap; font-size: 0.95rem; padding-left: 0.6rem; padding-right: 0.6rem; }
#strengths .grid-container { grid-template-columns: repeat(7, minmax(0, 1fr)); }
.apt-problem { border-color: #b91c1c; background: #fef2f2; color: #7f1d1d; }
.dark .apt-problem { background: #450a0a; color: #fecaca; border-color: #991b1b; }

.apt-summary { font-size: 1.05rem; margin: 0.2rem 0; }
.apt-bars, .apt-curve { margin: 0; padding: 0.8rem 1rem; border-radius: var(--radius-lg);
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); }
.apt-bars figcaption, .apt-curve figcaption { font-weight: 600; margin-bottom: 0.5rem; }
.apt-bar { display: grid; grid-template-columns: minmax(7rem, 15rem) 1fr 5.5rem; gap: 0.7rem; align-items: center;
  padding: 0.18rem 0; }
.apt-bar-track { height: 0.9rem; border-radius: 0.45rem; background: var(--neutral-200); overflow: hidden; }
.dark .apt-bar-track { background: var(--neutral-700); }
.apt-bar-fill { display: block; height: 100%; border-radius: 0.45rem; background: var(--neutral-400); }
.apt-marked .apt-bar-fill { background: var(--primary-600); }
.apt-marked .apt-bar-label, .apt-marked .apt-bar-value { font-weight: 600; }
.apt-bar-value { text-align: right; font-variant-numeric: tabular-nums; }
.apt-curve svg { width: 100%; height: auto; }
.apt-curve text { font-size: 11px; fill: var(--body-text-color-subdued); text-anchor: end; }
.apt-curve .apt-axis { text-anchor: start; }
.apt-curve .apt-end { text-anchor: end; }
.apt-grid line { stroke: var(--border-color-primary); }
.apt-faint { fill: none; stroke: var(--primary-400); stroke-opacity: 0.45; stroke-width: 1; }
.apt-mean { fill: none; stroke: var(--primary-600); stroke-width: 2.2; }
.apt-card { padding: 0.4rem 0.9rem; }
.apt-card h1 { font-size: 1.25rem; }
.apt-card h2 { font-size: 1.05rem; }
.apt-card td:first-child { white-space: nowrap; }
.apt-card table { font-size: 0.85rem; }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 2px; }

@media (max-width: 640px) {
  #strengths .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  #samples .grid-container { grid-template-columns: minmax(0, 1fr); }
  .apt-bar { grid-template-columns: 1fr auto; }
  .apt-bar-track { grid-column: 1 / -1; grid-row: 2; }
  .gradio-container { padding: 0.5rem !important; }
  .tab-container button { padding: 0 0.55rem !important; }
}
"""
