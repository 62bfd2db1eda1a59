// Elements. Text from the server becomes text nodes and attribute values, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element: attributes by name (null: not set), children as elements or text. */
export function html(tag, attributes = {}, ...children) {
  return built(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return built(document.createElementNS(SVG, tag), attributes, children);
}

function built(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Sets an element's text only if it changes, so that selections and screen readers are not disturbed. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A group of radio buttons; `onChoice` gets the value. */
export function choice(name, legend, values, onChoice) {
  const group = html("fieldset", { class: "choice" }, html("legend", { class: "unseen" }, legend));
  Object.entries(values).forEach(([value, label], at) => {
    const input = html("input", { type: "radio", name, value, checked: at ? null : "" });
    input.addEventListener("change", () => onChoice(value));
    group.append(html("label", {}, input, html("span", {}, label)));
  });
  return group;
}
