"""HTML, Markdown and figures of runs, evaluations, tokenizers and studies; model cards."""
