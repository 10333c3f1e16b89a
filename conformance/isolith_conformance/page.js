// A link into a closed part of the page opens it; without scripts the failing parts are open from the start.
function openTarget() {
  let part = location.hash && document.getElementById(location.hash.slice(1));
  const target = part;
  for (; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", openTarget);
openTarget();
