"Sphinx's settings: pages come from `_proc`, which tools/docs.py writes, and go to `_docs`."

project, author = 'rkd_fastai', 'rkd_fastai contributors'
copyright = '2026, rkd_fastai contributors'
extensions = ['myst_nb', 'sphinx.ext.mathjax']
exclude_patterns = ['_static']

nb_execution_mode = 'off'  # nbdev-test executes the notebooks; what they store is shown
myst_enable_extensions = ['dollarmath', 'deflist']
myst_heading_anchors = 4  # `losses.ipynb#akd_loss` is the heading of that name
suppress_warnings = ['myst.header']  # README-like pages may jump from # to ###

html_theme = 'furo'
html_title, html_favicon = 'rkd_fastai', 'icon.svg'
html_css_files = ['extra.css']
html_show_sphinx = html_show_sourcelink = html_copy_source = False
pygments_style, pygments_dark_style = 'friendly', 'monokai'
mathjax_path = 'mathjax/tex-chtml.js'  # comes with the site: a page fetches nothing from elsewhere
mathjax3_config = {'options': {'enableMenu': False}, 'chtml': {'matchFontHeight': False}}
