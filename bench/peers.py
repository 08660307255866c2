"""What people install instead, at the shape of a model and with random weights, for cpu_7b.py.

Each peer yields nothing when its library is imported, then opens a model and yields one session for each setting worth trying: (setting, start over, ids -> logits of the last position).
Only new ids are computed: each session keeps its cache of keys and values.
"""
import numpy as np


def session(compute, clear):
    "A session's two functions, from one that computes new ids and one that forgets all."
    known = 0

    def reset():
        nonlocal known
        clear()
        known = 0

    def advance(ids):
        nonlocal known
        logits = compute(ids[known:])
        known = len(ids)
        return logits
    return reset, advance


# llama.cpp

def llama_cpp(path, config, threads, context):
    import llama_cpp as api
    yield
    silent = api.llama_log_callback(lambda *_: None)     # lives as long as the sessions
    api.llama_log_set(silent, None)
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {path}")
    for flash in (False, True):
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = int(flash)
        state = api.llama_init_from_model(model, options)

        def compute(ids):
            array = (api.llama_token * len(ids))(*ids)
            if api.llama_decode(state, api.llama_batch_get_one(array, len(ids))):
                raise RuntimeError("llama_decode failed")
            return np.ctypeslib.as_array(api.llama_get_logits_ith(state, -1), (config.vocab_size,))

        yield f"flash attention {'on' if flash else 'off'}", *session(compute, lambda: api.llama_memory_clear(api.llama_get_memory(state), True))
        api.llama_free(state)


# OpenVINO

def write_openvino(path, config, bits, seed=0):
    "OpenVINO's own form of a LLaMA with random weights of 8 bits, a scale a row, or of 4, a scale per 128, as its own tools make them; its cache is inside."
    import openvino as ov
    from openvino import opset13 as op
    rng = np.random.default_rng(seed)
    shapes = config.tensor_shapes()
    heads, head_dim, kept = config.n_heads, config.head_dim, []

    def whole(*numbers):
        return op.constant(np.array(numbers, np.int64))

    def weight(name):
        rows, columns = shapes[name]
        packed = np.frombuffer(rng.bytes(rows * columns * bits // 8), np.uint8)
        kept.append(packed)                         # OpenVINO keeps a pointer only
        if bits == 8:
            numbers, grouped, scale = ov.Type.i8, [rows, columns], 0.02 / 74
        else:
            numbers, grouped, scale = ov.Type.i4, [rows, columns // 128, 128], 0.02 / 4.6
        values = op.constant(ov.Tensor(packed, grouped, numbers))
        scaled = op.multiply(op.convert(values, "f16"), np.full([*grouped[:-1], 1], scale, np.float16))
        return op.convert(scaled if bits == 8 else op.reshape(scaled, whole(rows, columns), False), "f32")

    def linear(x, name):
        return op.matmul(x, weight(name), False, True)

    def norm(x):
        mean = op.reduce_mean(op.power(x, np.float32(2)), whole(-1), True)
        return op.multiply(op.multiply(x, op.divide(np.float32(1), op.sqrt(op.add(mean, np.float32(config.norm_eps))))), np.ones(config.dim, np.float32))

    def split(x, count):
        return op.transpose(op.reshape(x, whole(0, 0, count, head_dim), True), whole(0, 2, 1, 3))

    def rotate(x):
        first, second = op.variadic_split(x, np.int64(3), whole(head_dim // 2, head_dim // 2)).outputs()
        return op.add(op.multiply(x, cos), op.multiply(op.concat([op.multiply(second, np.float32(-1)), first], -1), sin))

    def remember(x, name):
        start = op.broadcast(np.float32(0), op.concat([batch, whole(heads, 0, head_dim)], 0))
        past = op.read_value(start, name, ov.Type.f32, ov.PartialShape([-1, heads, -1, head_dim]))
        present = op.concat([op.gather(past, beam, np.int64(0)), x], 2)
        return present, op.assign(present, name)

    ids = op.parameter([-1, -1], ov.Type.i64, "input_ids")
    positions = op.parameter([-1, -1], ov.Type.i64, "position_ids")
    beam = op.parameter([-1], ov.Type.i32, "beam_idx")
    batch = op.gather(op.shape_of(ids), whole(0), np.int64(0))
    rates = config.rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = op.multiply(op.unsqueeze(op.convert(positions, "f32"), whole(1, 3)), rates[None, None, None])
    angles = op.concat([angles, angles], -1)
    cos, sin = op.cos(angles), op.sin(angles)

    x, assigns = op.gather(weight("tok_embeddings.weight"), ids, np.int64(0)), []
    for layer in range(config.n_layers):
        at = f"layers.{layer}."
        h = norm(x)
        q = rotate(split(linear(h, at + "attention.wq.weight"), heads))
        k, assign_k = remember(rotate(split(linear(h, at + "attention.wk.weight"), heads)), f"keys {layer}")
        v, assign_v = remember(split(linear(h, at + "attention.wv.weight"), heads), f"values {layer}")
        assigns += [assign_k, assign_v]
        mixed = op.scaled_dot_product_attention(q, k, v, causal=True)
        mixed = op.reshape(op.transpose(mixed, whole(0, 2, 1, 3)), whole(0, 0, config.dim), True)
        x = op.add(x, linear(mixed, at + "attention.wo.weight"))
        h = norm(x)
        gate = linear(h, at + "feed_forward.w1.weight")
        x = op.add(x, linear(op.multiply(op.swish(gate), linear(h, at + "feed_forward.w3.weight")), at + "feed_forward.w2.weight"))
    last = op.slice(norm(x), whole(-1), whole(2**31), whole(1), whole(1))
    logits = op.result(linear(last, "tok_embeddings.weight" if config.tied else "output.weight"))
    path.mkdir()
    ov.save_model(ov.Model([logits], assigns, [ids, positions, beam]), path / "model.xml", compress_to_fp16=False)


def openvino(path, config, threads, context):
    import openvino as ov
    yield
    core, length = ov.Core(), 0
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}

    def clear():
        nonlocal length
        request.reset_state()
        length = 0

    def compute(ids):
        nonlocal length
        positions = np.arange(length, length + len(ids))[None]
        length += len(ids)
        return request.infer([np.array([ids]), positions, np.zeros(1, np.int32)])[0][0, -1]

    for precision in ({}, {"INFERENCE_PRECISION_HINT": "f32"}):
        compiled = core.compile_model(path / "model.xml", "CPU", settings | precision)
        request = compiled.create_infer_request()
        yield compiled.get_property("INFERENCE_PRECISION_HINT").to_string(), *session(compute, clear)
        del request, compiled


# PyTorch

def transformers(path, config, threads, context):
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    yield
    torch.set_num_threads(threads)
    shape = LlamaConfig(hidden_size=config.dim, num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
                        intermediate_size=config.hidden_dim, vocab_size=config.vocab_size, rms_norm_eps=config.norm_eps, max_position_embeddings=context,
                        tie_word_embeddings=config.tied)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape).to(torch.bfloat16).eval()
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(shape)
    for weights in model.parameters():
        weights.data.uniform_(-0.035, 0.035)
    cache = DynamicCache()

    def clear():
        nonlocal cache
        cache = DynamicCache()

    @torch.inference_mode()
    def compute(ids):
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float().numpy()

    yield "bfloat16", *session(compute, clear)
