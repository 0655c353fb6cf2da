"""Pages: values -> HTML files that need nothing but themselves.

To be read in this order:

    render.py   a template, its styles, scripts and data become one file: `write_page`, `chance`
    charts.py   curves as SVG that takes the page's colours: `chart`, `Curve`
    templates/  the pages
"""
