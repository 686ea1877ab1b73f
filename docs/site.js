// For people without a mouse: tables and formulas that scroll get the focus, and the buttons that the
// theme's script adds to each block of code are no landmark.
function label() {
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap, math[display=block]")) {
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
    else wide.removeAttribute("tabindex");
  }
  for (const buttons of document.querySelectorAll(".md-code__nav")) buttons.role = "none";
}
new MutationObserver(label).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", label);
label();
