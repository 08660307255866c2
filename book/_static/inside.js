// The live part of chapter 25. Everything it shows was computed by the chapter and lies in the page as JSON.
(() => {
  const box = document.querySelector(".inside-live"), store = document.querySelector("script.inside-data")
  if (!box || !store) return
  const prompts = JSON.parse(store.textContent)
  for (const prompt of prompts) prompt.bytes = Uint8Array.from(atob(prompt.weights), c => c.charCodeAt(0))

  const make = (tag, attributes = {}, ...children) => {
    const svg = ["svg", "rect", "text", "title"].includes(tag)
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag)
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
    element.append(...children)
    return element
  }
  const shown = piece => piece.trim() === "" ? "␣" : piece.replace(/^ /, "␣")
  const quoted = piece => `“${shown(piece)}”`
  const percent = share => share >= 0.0995 ? `${Math.round(100 * share)} %` : `${(100 * share).toFixed(1)} %`

  // The weight, 0 to 1, that a head gives to `key` from `query`; only those below the diagonal are stored.
  const weight = (prompt, layer, head, query, key) => {
    const size = prompt.pieces.length, pairs = size * (size + 1) / 2
    return prompt.bytes[(layer * prompt.heads + head) * pairs + query * (query + 1) / 2 + key] / 255
  }
  // The five likeliest words at a place when so many blocks were passed.
  const guesses = (prompt, passed, place) => {
    const first = 5 * (passed * prompt.pieces.length + place)
    return [0, 1, 2, 3, 4].map(i => [prompt.words[prompt.best[first + i]], prompt.chances[first + i] / 1000])
  }

  const state = { prompt: 0, layer: 0, head: 0, token: 0 }
  const ids = name => `inside-${name}`
  const select = make("select", { id: ids("prompt") }, ...prompts.map((prompt, index) => make("option", { value: index }, `${prompt.model}: ${prompt.pieces.join(prompt.model === "bard" ? " " : "")}`)))
  const slider = name => make("input", { type: "range", id: ids(name), min: 0, step: 1 })
  const layer = slider("layer"), head = slider("head")
  const layerLabel = make("label", { for: ids("layer") }), headLabel = make("label", { for: ids("head") })
  const tokens = make("div", { class: "tokens" }), says = make("p", { class: "says", role: "status" })
  const all = make("canvas", { class: "all", role: "img" })
  const map = make("div", { class: "map" }), lens = make("div", { class: "lens" }), best = make("ol", { class: "best" })
  const mapTitle = make("h4"), bestTitle = make("h4")
  box.replaceChildren(
    make("div", { class: "controls" },
      make("div", {}, make("label", { for: ids("prompt") }, "Model and prompt"), select),
      make("div", {}, layerLabel, layer), make("div", {}, headLabel, head)),
    make("fieldset", {}, make("legend", {}, "Token that looks"), tokens), says,
    make("h4", {}, "All heads: a column per layer, a row per head"), all,
    make("div", { class: "views" },
      make("div", {}, mapTitle, map, bestTitle, best),
      make("div", {}, make("h4", {}, "After so many blocks, the stream says"), lens)))

  function fillPrompt() {
    const prompt = prompts[state.prompt]
    Object.assign(state, { layer: Math.min(state.layer, prompt.layers - 1), head: Math.min(state.head, prompt.heads - 1), token: prompt.pieces.length - 1 })
    layer.max = prompt.layers - 1
    head.max = prompt.heads - 1
    tokens.replaceChildren(...prompt.pieces.map((piece, index) => make("label", {}, make("input", { type: "radio", name: ids("token"), value: index }), shown(piece))))
    lens.replaceChildren(...Array.from({ length: prompt.layers + 1 }, (_, passed) => {
      const row = make("button", { type: "button" }, make("span"), make("span"), make("span"))
      row.addEventListener("click", () => choose({ layer: Math.max(passed - 1, 0) }))
      return row
    }))
    drawMap(prompt)
  }

  // One cell per pair of tokens; `show` only changes their opacity.
  let cells, frame
  function drawMap(prompt) {
    const size = prompt.pieces.length, names = prompt.pieces.map(shown)
    const left = 6 + 6.2 * Math.max(...names.map(name => name.length)), side = 20, width = left + size * side + 2
    const svg = make("svg", { viewBox: `0 0 ${width} ${size * side + left}`, role: "img", "font-size": 10 })
    svg.append(make("rect", { class: "ground", x: left, y: 0, width: size * side, height: size * side }))
    cells = []
    for (let query = 0; query < size; query++) {
      svg.append(make("text", { x: left - 4, y: query * side + 14, "text-anchor": "end" }, names[query]))
      svg.append(make("text", { transform: `translate(${left + query * side + 14} ${size * side + 4}) rotate(-90)`, "text-anchor": "end" }, names[query]))
      for (let key = 0; key <= query; key++) {
        const cell = make("rect", { class: "weight", x: left + key * side + 1, y: query * side + 1, width: side - 2, height: side - 2 }, make("title"))
        cell.addEventListener("click", () => choose({ token: query }))
        cells.push([cell, query, key])
        svg.append(cell)
      }
    }
    frame = make("rect", { class: "row", x: left, width: size * side, height: side })
    svg.append(frame)
    map.replaceChildren(svg)
  }

  // All maps as one picture, a pixel per weight.
  function drawAll() {
    const prompt = prompts[state.prompt], size = prompt.pieces.length, step = size + 2, scale = 2
    const style = getComputedStyle(box), ink = style.getPropertyValue("--pst-color-primary"), mark = style.getPropertyValue("--pst-color-accent")
    all.width = scale * step * prompt.layers
    all.height = scale * step * prompt.heads
    const draw = all.getContext("2d")
    draw.scale(scale, scale)
    draw.fillStyle = ink
    for (let l = 0; l < prompt.layers; l++)
      for (let h = 0; h < prompt.heads; h++)
        for (let query = 0; query < size; query++)
          for (let key = 0; key <= query; key++) {
            draw.globalAlpha = weight(prompt, l, h, query, key)
            if (draw.globalAlpha > 0.02) draw.fillRect(l * step + key + 1, h * step + query + 1, 1, 1)
          }
    draw.globalAlpha = 1
    draw.strokeStyle = mark
    draw.lineWidth = 1.5
    draw.strokeRect(state.layer * step + .75, state.head * step + .75, step - 1.5, step - 1.5)
    all.setAttribute("aria-label", `All ${prompt.layers * prompt.heads} attention maps; layer ${state.layer}, head ${state.head} is marked. The sliders above choose.`)
  }

  function show() {
    const prompt = prompts[state.prompt], names = prompt.pieces.map(shown), query = state.token
    layer.value = state.layer
    head.value = state.head
    layerLabel.textContent = `Layer ${state.layer}`
    headLabel.textContent = `Head ${state.head}`
    tokens.querySelectorAll("input").forEach((input, index) => { input.checked = index === query })
    for (const [cell, row, key] of cells) {
      const share = weight(prompt, state.layer, state.head, row, key)
      cell.setAttribute("fill-opacity", share.toFixed(3))
      cell.firstChild.textContent = `${names[row]} → ${names[key]}: ${percent(share)}`
    }
    frame.setAttribute("y", query * 20)
    const looks = names.slice(0, query + 1).map((name, key) => [name, key, weight(prompt, state.layer, state.head, query, key)]).sort((a, b) => b[2] - a[2])
    const places = looks.slice(0, 3).filter(([, , share]) => share >= .05).map(([name, key, share]) => `“${name}” (token ${key + 1}, ${percent(share)})`)
    mapTitle.textContent = `Layer ${state.layer}, head ${state.head}: rows look, columns are looked at`
    map.firstChild.setAttribute("aria-label", `Attention map of layer ${state.layer}, head ${state.head}`)
    const after = guesses(prompt, state.layer + 1, query)
    says.textContent = `“${names[query]}” (token ${query + 1}) looks at ${places.join(", ") || "nothing in particular"}. After layer ${state.layer} the stream there says ${quoted(after[0][0])} (${percent(after[0][1])}).`
    bestTitle.textContent = `At “${names[query]}”, after layer ${state.layer}`
    best.replaceChildren(...after.map(([word, chance]) => make("li", { style: `--chance: ${100 * chance}%` }, make("span", {}, shown(word)), make("span", {}, percent(chance)))))
    Array.from(lens.children).forEach((row, passed) => {
      const [word, chance] = guesses(prompt, passed, query)[0]
      row.style.setProperty("--chance", `${100 * chance}%`)
      row.setAttribute("aria-pressed", passed === state.layer + 1)
      row.children[0].textContent = passed
      row.children[1].textContent = shown(word)
      row.children[2].textContent = percent(chance)
    })
    drawAll()
  }

  function choose(change) {
    Object.assign(state, change)
    if ("prompt" in change) fillPrompt()
    show()
  }

  select.addEventListener("change", () => choose({ prompt: Number(select.value) }))
  layer.addEventListener("input", () => choose({ layer: Number(layer.value) }))
  head.addEventListener("input", () => choose({ head: Number(head.value) }))
  tokens.addEventListener("change", event => choose({ token: Number(event.target.value) }))
  all.addEventListener("click", event => {
    const place = all.getBoundingClientRect(), prompt = prompts[state.prompt]
    choose({ layer: Math.min(Math.floor((event.clientX - place.left) / place.width * prompt.layers), prompt.layers - 1),
             head: Math.min(Math.floor((event.clientY - place.top) / place.height * prompt.heads), prompt.heads - 1) })
  })
  new MutationObserver(drawAll).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme", "data-mode"] })
  choose({ prompt: 1, layer: 18, head: 6 })
  select.value = state.prompt
})()
