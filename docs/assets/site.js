// The keyboard scrolls each code block and table that is wider than the page. The theme wraps tables after the page loads.
const reach = () => {
  for (const wide of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) {
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
    else wide.removeAttribute("tabindex");
  }
};
new MutationObserver(reach).observe(document.body, { childList: true, subtree: true });
new ResizeObserver(reach).observe(document.body);
