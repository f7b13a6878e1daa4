// Run an exported model with transformers.js: node transformers.mjs NODE_MODULES MODEL IMAGE DTYPE …
// MODEL is a folder, or http://HUB/OWNER/NAME. Prints JSON: for each dtype what the model and the
// pipeline return.
const [modules, place, image, ...dtypes] = process.argv.slice(2);
const library = await import(`${modules}/@huggingface/transformers/dist/transformers.node.mjs`);
const { env } = library;
env.cacheDir = `${image}.cache`;
const [, host, name] = place.match(/^(https?:\/\/.*?\/|.*\/)(.*)/);
env.allowLocalModels = !host.startsWith("http");
env.allowRemoteModels = !env.allowLocalModels;
env.localModelPath = env.remoteHost = host;
const processor = await library.AutoImageProcessor.from_pretrained(name);
const picture = await library.RawImage.read(image);
const { pixel_values } = await processor(picture);
const values = (tensor) => ({ dims: tensor.dims, data: [...tensor.data] });

const found = { pixel_values: values(pixel_values) };
for (const dtype of dtypes) {
  const model = await library.AutoModel.from_pretrained(name, { dtype });
  const outputs = await model({ pixel_values });
  found[dtype] = Object.fromEntries(Object.entries(outputs).map(([key, value]) => [key, values(value)]));
  if (outputs.logits) {
    // pipeline("image-classification") knows no Raptor: its class takes any model
    const classify = new library.ImageClassificationPipeline({ task: "image-classification", model, processor });
    found[dtype].pipeline = await classify(picture);
  } else {
    const extract = await library.pipeline("image-feature-extraction", name, { dtype });
    found[dtype].pipeline = values(await extract(picture));
  }
}
console.log(JSON.stringify(found));
