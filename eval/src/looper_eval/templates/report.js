"use strict";
const items = [...document.querySelectorAll("#viewer > details")];
const texts = items.map((item) => item.textContent.toLowerCase());
const search = document.getElementById("search");
const filter = document.getElementById("filter");
const count = document.getElementById("count");
function apply() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const tag = filter.value;
  let shown = 0;
  items.forEach((item, index) => {
    const tagged = !tag || item.dataset.tags.split(" ").includes(tag);
    const visible = tagged && words.every((word) => texts[index].includes(word));
    item.hidden = !visible;
    shown += visible;
  });
  count.textContent = shown + " of " + items.length + " questions";
}
function openTarget() {
  const target = items.find((item) => "#" + item.id === location.hash);
  if (!target) return;
  if (target.hidden) { search.value = ""; filter.value = ""; apply(); }
  target.open = true;
  // Rows that come into view are laid out only now and move the target; so scroll until it stays.
  const settle = (left) => {
    target.scrollIntoView();
    if (left) requestAnimationFrame(() => settle(left - 1));
  };
  settle(3);
}
search.addEventListener("input", apply);
filter.addEventListener("change", apply);
for (const button of document.querySelectorAll("button[data-show]")) {
  button.addEventListener("click", () => {
    search.value = "";
    filter.value = button.dataset.show;
    apply();
    document.getElementById("questions").scrollIntoView();
  });
}
addEventListener("hashchange", openTarget);
openTarget();
