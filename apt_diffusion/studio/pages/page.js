// Ctrl+Enter, settings from pictures, the brush, movable frames, sliders over steps, and copying of links.
(() => {
  if (window.aptStudio) return; // Gradio adds the head of the page twice
  window.aptStudio = true;
  const write = (where, value) => {
    const field = document.querySelector(`${where} textarea, ${where} input`);
    if (!field || field.value === value) return;
    const type = field.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(type.prototype, "value").set.call(field, value);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (!event.target.closest("#prompt, #negative-prompt, #seed")) return;
    event.preventDefault();
    document.querySelector("#draw")?.click();
  });

  // Settings that a PNG carries: an iTXt chunk with our keyword. The picture stays in the browser.
  const settingsIn = async (file) => {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const view = new DataView(bytes.buffer);
    const decoder = new TextDecoder();
    if (bytes.length < 33 || decoder.decode(bytes.slice(1, 4)) !== "PNG") return "";
    for (let place = 8; place + 12 <= bytes.length; ) {
      const length = view.getUint32(place);
      const kind = decoder.decode(bytes.slice(place + 4, place + 8));
      const data = bytes.slice(place + 8, place + 8 + length);
      const end = data.indexOf(0);
      if (kind === "iTXt" && decoder.decode(data.slice(0, end)) === "apt_diffusion" && data[end + 1] === 0) {
        let start = end + 3;
        for (let part = 0; part < 2; part++) start = data.indexOf(0, start) + 1; // language, translated keyword
        return decoder.decode(data.slice(start));
      }
      place += 12 + length;
    }
    return "";
  };
  const restore = async (file) => {
    if (!file || file.size > 50e6) return;
    const settings = await settingsIn(file);
    write("#restored", ""); // the same picture can be dropped twice
    setTimeout(() => write("#restored", settings || "none"), 50);
  };
  const takesFiles = (target) => target.closest?.("[data-testid='upload-file'], .upload-container, .wrap input, button[aria-dropeffect], #start-picture, #pictures, #adapter-file, #ask-picture, #class-picture, #shots");
  const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (hasFile(event) && !takesFiles(event.target)) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!hasFile(event) || takesFiles(event.target)) return;
    event.preventDefault();
    restore(event.dataTransfer.files[0]);
  });
  document.addEventListener("change", (event) => {
    if (!event.target.matches?.("input[data-restore]")) return;
    restore(event.target.files[0]);
    event.target.value = "";
  });

  document.addEventListener("click", async (event) => {
    const copy = event.target.closest?.("button[data-copy]");
    if (copy) {
      await navigator.clipboard?.writeText(new URL(copy.dataset.copy, location.href).href);
      copy.textContent = "Copied";
    }
    const clear = event.target.closest?.("#brush button[data-clear]");
    if (clear) {
      const canvas = document.querySelector("#brush canvas");
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
      write("#mask", "");
    }
  });

  // The brush: what is painted becomes a mask, white on black.
  let stroke = null;
  const at = (canvas, event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
  };
  const paint = (canvas, from, to) => {
    const pen = canvas.getContext("2d");
    pen.lineCap = "round";
    pen.lineWidth = document.querySelector("#brush input[type=range]").value;
    pen.strokeStyle = "#dc2626";
    pen.beginPath();
    pen.moveTo(...from);
    pen.lineTo(to[0] + 0.01, to[1]);
    pen.stroke();
  };
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.matches?.("#brush canvas")) return;
    event.preventDefault();
    stroke = at(event.target, event);
    paint(event.target, stroke, stroke);
  });
  document.addEventListener("pointermove", (event) => {
    const canvas = document.querySelector("#brush canvas");
    if (!stroke || !canvas) return;
    const next = at(canvas, event);
    paint(canvas, stroke, next);
    stroke = next;
  });
  document.addEventListener("pointerup", () => {
    const canvas = document.querySelector("#brush canvas");
    if (!stroke || !canvas) return;
    stroke = null;
    const mask = document.createElement("canvas");
    [mask.width, mask.height] = [canvas.width, canvas.height];
    const pen = mask.getContext("2d");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const value = pixels.data[i + 3] > 127 ? 255 : 0;
      pixels.data.set([value, value, value, 255], i);
    }
    pen.putImageData(pixels, 0, 0);
    write("#mask", mask.toDataURL("image/png"));
  });

  document.addEventListener("input", (event) => {
    const slider = event.target;
    if (slider.matches?.("input[data-frame]")) {
      const figure = slider.closest("figure");
      figure.style.setProperty("--place", slider.value);
      figure.dataset.moved = "";
      figure.querySelector(".apt-square").hidden = true; // the trainer's own cut is not it any more
      const section = slider.closest(".apt-frames");
      const places = Array(Number(section.dataset.count)).fill(null);
      for (const other of section.querySelectorAll("figure[data-moved] input[data-frame]"))
        places[Number(other.dataset.frame)] = Number(other.value);
      write("#frames", JSON.stringify(places));
    }
    if (slider.matches?.("input[data-steps]")) {
      const figure = slider.closest("figure");
      const images = [...figure.querySelectorAll(":scope > img")];
      images.forEach((image, number) => (image.hidden = number !== Number(slider.value)));
      figure.querySelector("[data-says]").textContent = images[slider.value].alt;
    }
  });
})();
