"A random teacher of each family, of 64 channels, with its processor and batches."

import socket
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Glm4vImageProcessorPil,
    GotOcr2ImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)

from heed_nb.minicpm import MiniCPMVImageProcessor
from heed_nb.teachers import family_class

VOCABULARY = 256 + 16
PATCHES = dict(patch_size=8, temporal_patch_size=1, size=dict(shortest_edge=16 * 16, longest_edge=96 * 96))
TEXT = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_attention_heads=4, initializer_range=0.15)


@dataclass(frozen=True)
class Tiny:
    see: str  # what stands for an image in a prompt
    special: tuple  # the vision tokens, the image's first
    image_processor: object
    text: dict
    vision: dict
    config: dict = field(default_factory=dict)
    processing: dict = field(default_factory=dict)


ROPE = dict(rope_type="default", rope_theta=1e4)
VISION = dict(hidden_size=32, intermediate_size=48, patch_size=8)
GRID = VISION | dict(depth=2, num_heads=2, temporal_patch_size=1, out_hidden_size=64, initializer_range=0.15)
SLICE = VISION | dict(num_hidden_layers=2, num_attention_heads=2)
TINY = {
    "qwen3_vl": Tiny(
        "<|vision_start|><|image_pad|><|vision_end|>",
        ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
        Qwen2VLImageProcessorPil(**PATCHES),
        dict(
            num_key_value_heads=2,
            head_dim=8,
            rope_parameters=ROPE | dict(mrope_section=[2, 1, 1], mrope_interleaved=True),
        ),
        GRID | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
    ),
    "internvl": Tiny(
        "<IMG_CONTEXT>",
        ("<IMG_CONTEXT>", "<img>", "</img>"),
        GotOcr2ImageProcessorPil(size=dict(height=32, width=32), max_patches=4),
        dict(model_type="qwen3", num_key_value_heads=2, head_dim=8, rope_parameters=ROPE),
        SLICE | dict(image_size=32, attention_bias=True, initializer_range=0.15),
        config=dict(image_seq_length=4, tie_word_embeddings=False),
        processing=dict(image_seq_length=4),
    ),
    "glm4v": Tiny(
        "<|begin_of_image|><|image|><|end_of_image|>",
        ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>"),
        Glm4vImageProcessorPil(**PATCHES),
        dict(num_key_value_heads=1, rope_parameters=ROPE | dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.5)),
        GRID | dict(image_size=32),
    ),
    "minicpmv": Tiny(
        "<unk>",
        ("<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>"),
        MiniCPMVImageProcessor(scale_resolution=48, patch_size=8, image_feature_size=4),
        dict(num_key_value_heads=2, head_dim=8, rope_parameters=ROPE),
        SLICE | dict(image_size=48),
        config=dict(query_num=4),
    ),
}


def tokenizer(family):
    "Bytes and the family's vision tokens; padding on the left."
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytes_.train_from_iterator(
        [],
        trainers.BpeTrainer(
            special_tokens=["<|endoftext|>", "<|im_end|>", *TINY[family].special],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def processor(family):
    tiny = TINY[family]
    template = (
        "{%- for m in messages %}{%- for c in m.content %}{{- 'SEE' if c.type == 'image' else c.text }}{%- endfor %}"
        "{{- '<|im_end|>' if m.role == 'assistant' else ':' }}{%- endfor %}"
    ).replace("SEE", tiny.see)
    build = family_class(family).processor_class
    return build(tiny.image_processor, tokenizer(family), chat_template=template, **tiny.processing)


def config(family, layers=4):
    tiny, tokens = TINY[family], tokenizer(family)
    ends = dict(pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id)
    text = TEXT | tiny.text | ends | dict(num_hidden_layers=layers)
    return AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=tiny.vision,
        image_token_id=tokens.convert_tokens_to_ids(tiny.special[0]),
        **tiny.config,
    )


def teacher(family, layers=4, seed=0):
    "No bias, norm or embedding, that of the padding included, is where it starts."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config(family, layers)).eval()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
    return model


def page(width, height, seed=0):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def samples(family):
    "(text, images): no image, one, two of different sizes, one more."
    see = TINY[family].see
    return [
        ("what is a total?", []),
        (see + "read it", [page(48, 64)]),
        (see + "or" + see + "?", [page(96, 32, 1), page(48, 64, 2)]),
        (see, [page(64, 64, 3)]),
    ]


def batch_of(samples, processor, side="left"):
    images = [image for _, images in samples for image in images]
    return dict(
        processor(
            text=[text for text, _ in samples],
            images=images or None,
            return_tensors="pt",
            padding=True,
            padding_side=side,
        )
    )


def fails(match, call, *args, **kwargs):
    "Holds that the call raises a ValueError of one line."
    with pytest.raises(ValueError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def run_two_ranks(processes, target, folder):
    "Runs target(folder, rank, port) in two processes of a multiprocessing context, on a free port."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=target, args=(folder, rank, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
