const graph = document.getElementById("graph");
const hide = (frame) => {
  for (const other of frame.parentElement.children) other.classList.toggle("hidden", other !== frame);
};
const show = () => {
  for (const frame of graph.querySelectorAll(".hidden")) frame.classList.remove("hidden");
};
graph.addEventListener("click", (event) => {
  const frame = event.target.closest(".frame");
  if (!frame) return;
  show();
  for (let each = frame; each !== graph; each = each.parentElement) {
    if (each.classList.contains("frame")) hide(each);
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") show(); });
