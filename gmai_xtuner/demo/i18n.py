"""What the page says, in English and Chinese, and errors that can be said in both."""

from __future__ import annotations

from typing import Any, Literal

from gmai_xtuner.core.errors import GMAIError

Language = Literal["en", "zh"]
LANGUAGES: dict[Language, str] = {"en": "English", "zh": "中文"}

BANNER = {
    "en": "Research software. Not a medical device, not for clinical use: answers can be wrong.",
    "zh": "研究用软件，非医疗器械，不得用于临床：回答可能有误。",
}
"""Shown in both languages whichever the interface has."""

WORDS: dict[str, tuple[str, str]] = {
    # layout
    "title": ("Try the model", "模型试用"),
    "images": ("Images", "图像"),
    "conversation": ("Conversation", "对话"),
    "drop": (
        "Drop files here or press +",
        "将文件拖到此处，或点按 +",
    ),
    "accepted": (
        "PNG, JPEG, TIFF, DICOM (all files of a series at once), NIfTI; at most {limit} MB at once",
        "PNG、JPEG、TIFF、DICOM（一次性提供序列的所有文件）、NIfTI；每次最多 {limit} MB",
    ),
    "examples": ("Examples", "示例"),
    "no_images": (
        "No image yet. A question can also be asked without one.",
        "尚无图像。也可以不带图像提问。",
    ),
    "image_number": ("Image {number}", "图像 {number}"),
    "will_send": ("Goes with the next question", "随下一个问题发送"),
    "was_sent": ("Sent already; tick to send it again", "已发送；勾选可再次发送"),
    "not_sent": ("Stays out of the next question", "不随下一个问题发送"),
    "remove": ("Remove", "移除"),
    "axis": ("Direction", "方向"),
    "frame": ("Frame", "帧"),
    "slice": ("Slice", "层面"),
    "channel": ("Time point or channel", "时间点或通道"),
    "z": ("axial", "横断面"),
    "y": ("coronal", "冠状面"),
    "x": ("sagittal", "矢状面"),
    "window": ("Window", "窗"),
    "center": ("Centre", "窗位"),
    "width": ("Width", "窗宽"),
    "file": ("of the file", "文件自带"),
    "default": ("default", "默认"),
    "soft_tissue": ("soft tissue 40/400", "软组织 40/400"),
    "lung": ("lung −600/1500", "肺 −600/1500"),
    "brain": ("brain 40/80", "脑 40/80"),
    "bone": ("bone 400/1800", "骨 400/1800"),
    "custom": ("by hand", "手动"),
    "no_orientation": (
        "The file does not say which side is left: the picture may be mirrored.",
        "文件未注明左右方向：图像可能左右颠倒。",
    ),
    "not_finite": (
        "Some voxels hold no number; they are shown as the smallest value.",
        "部分体素没有有效数值，按最小值显示。",
    ),
    "uneven": (
        "The slices lie at uneven distances or are tilted, so they are shown in their own direction only.",
        "层间距不均匀或层面倾斜，因此只按扫描方向显示。",
    ),
    # asking
    "tasks": ("Tasks", "任务"),
    "question": ("Your question", "您的问题"),
    "ask": ("Ask", "提问"),
    "stop": ("Stop", "停止"),
    "new": ("New conversation", "新对话"),
    "empty_conversation": (
        "Choose an image and a task, or write a question.",
        "请选择图像和任务，或输入问题。",
    ),
    "waiting": ("Waiting: {ahead} ahead of you …", "排队中：前面还有 {ahead} 个 …"),
    "next": ("Comes next …", "即将回答 …"),
    "thinking": ("The model is reading …", "模型正在读取 …"),
    "stopped": ("Stopped by you", "已由您停止"),
    "cut": ("Cut off at the longest answer of the settings", "已达到设置中的最大回答长度，被截断"),
    "failed": ("No answer: {why}", "没有回答：{why}"),
    "empty_answer": ("(The model gave an empty answer.)", "（模型给出了空回答。）"),
    "seconds": ("{seconds} s", "{seconds} 秒"),
    "settings": ("Settings", "设置"),
    "max_new_tokens": ("Longest answer, tokens", "回答最长（词元）"),
    "temperature": ("Temperature (0: the likeliest answer)", "温度（0：最可能的回答）"),
    "top_p": ("Top-p", "Top-p"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed (empty: another answer each time)", "随机种子（空：每次不同）"),
    "system": ("System text", "系统提示"),
    "coordinates": ("Coordinates in answers are", "回答中的坐标为"),
    "auto": ("found out", "自动判断"),
    "thousandths": ("thousandths of the sides", "边长的千分之几"),
    "pixels": ("pixels", "像素"),
    "fractions": ("fractions of the sides", "边长的比例"),
    # boxes
    "boxes_drawn": (
        "Boxes drawn on image {number}: {count}. Numbers are read as {unit}.",
        "图像 {number} 上绘制了 {count} 个框，坐标按{unit}解读。",
    ),
    "boxes_on": ("Draw on image", "绘制于图像"),
    "box_clipped": ("{text}: a part lies outside the image", "{text}：部分超出图像"),
    "box_order": (
        "{text}: not drawn, x1 < x2 and y1 < y2 expected",
        "{text}：未绘制，应满足 x1 < x2 且 y1 < y2",
    ),
    "box_outside": ("{text}: not drawn, outside the image", "{text}：未绘制，位于图像之外"),
    "box_too_many": ("{text}: not drawn, too many boxes", "{text}：未绘制，框过多"),
    # model
    "models": ("Model", "模型"),
    "parameters": ("parameters", "参数"),
    "weights": ("weights", "权重"),
    "memory": ("memory", "内存"),
    # answers to a browser without a page
    "sign_in": ("Name and password are needed.", "需要用户名和密码。"),
}

ERRORS: dict[str, tuple[str, str]] = {
    "damaged": (
        "The file is damaged, or of a kind that can't be read. Copy it again from its source.",
        "文件已损坏或无法读取。请从来源重新复制。",
    ),
    "empty_file": ("The file is empty (0 bytes).", "文件为空（0 字节）。"),
    "unsupported": (
        "This is no picture that can be opened here. Give PNG, JPEG, TIFF of one page, DICOM or NIfTI.",
        "无法打开此文件。请提供 PNG、JPEG、单页 TIFF、DICOM 或 NIfTI。",
    ),
    "too_large_image": (
        "The picture has more than {limit} pixels. Shrink it, or cut out the part that matters.",
        "图像超过 {limit} 像素。请缩小，或截取需要的部分。",
    ),
    "too_many_pixels": (
        "{width} × {height} pixels; at most {limit} are taken. Shrink it, or cut out the part that matters.",
        "{width} × {height} 像素，超过上限 {limit}。请缩小，或截取需要的部分。",
    ),
    "too_many_voxels": (
        "{count} voxels; at most {limit} are taken. Give a part of the series.",
        "共 {count} 个体素，超过上限 {limit}。请只提供部分序列。",
    ),
    "too_stretched": (
        "Its voxels are {spacing} mm, so a slice with square pixels has {width} × {height} of them; at most "
        "{limit} are taken. Correct the spacing in the file.",
        "体素大小为 {spacing} mm，按方形像素显示的切面为 {width} × {height} 像素，超过上限 {limit}。"
        "请更正文件中的体素间距。",
    ),
    "upload_too_large": (
        "More than {limit} MB at once. Give fewer or smaller files.",
        "一次上传超过 {limit} MB。请减少文件或使用较小的文件。",
    ),
    "upload_failed": (
        "The upload did not arrive. Try again.",
        "上传失败，请重试。",
    ),
    "memory_full": (
        "The server has no room for this image now. Remove others, or try again later.",
        "服务器暂无空间存放此图像。请移除其他图像，或稍后再试。",
    ),
    "too_many_images": (
        "At most {limit} images at a time. Remove some first.",
        "最多同时 {limit} 幅图像。请先移除一些。",
    ),
    "no_picture": (
        "A DICOM object of kind {kind} holds no picture of the patient.",
        "类型为 {kind} 的 DICOM 对象不含患者图像。",
    ),
    "pixels": (
        "The pixels of this DICOM file can't be decoded: it is cut off, damaged, or of a rare encoding.",
        "无法解码此 DICOM 文件的像素：文件不完整、损坏或编码罕见。",
    ),
    "photometric": (
        "The DICOM file's colours ({name}) are not known.",
        "未知的 DICOM 颜色类型（{name}）。",
    ),
    "no_directions": (
        "The volume does not say how it lies in the body (its affine can't be inverted).",
        "该体数据没有可用的方向信息（仿射矩阵不可逆）。",
    ),
    "nifti_axes": (
        "A volume has three axes, or four with time points; this file has {shape}.",
        "体数据应有三个轴，或含时间点的四个轴；此文件为 {shape}。",
    ),
    "nifti_type": (
        "The voxels ({type}) are no grey levels.",
        "体素（{type}）不是灰度值。",
    ),
    "zip": (
        "A ZIP is not opened here. Give the files in it, all at once.",
        "此处不打开 ZIP。请一次性提供其中的所有文件。",
    ),
    "no_question": ("Write a question, or choose a task.", "请输入问题或选择任务。"),
    "long_question": (
        "The question has {count} characters; at most {limit} are taken.",
        "问题有 {count} 个字符，最多 {limit} 个。",
    ),
    "marks": (
        "The question has {marks} <image> mark(s), but {images} image(s) go with it. "
        "Write one for each, or none.",
        "问题中有 {marks} 个 <image> 标记，但随附 {images} 幅图像。请一一对应，或不写标记。",
    ),
    "too_long": (
        "The conversation has {count} tokens with its images; the model's {limit} leave {room} for it. "
        "Begin a new conversation, or lower the longest answer.",
        "对话连同图像共 {count} 个词元，模型上限为 {limit}，扣除回答后只剩 {room}。"
        "请开始新对话，或减小回答长度。",
    ),
    "busy": (
        "Too many questions are waiting. Try again in a minute.",
        "排队的问题过多，请稍后再试。",
    ),
    "setting": (
        "{name}: a number from {low} to {high} is expected.",
        "{name}：应为 {low} 到 {high} 之间的数。",
    ),
    "model_failed": (
        "the model stopped with an error ({kind}); the server's log has more",
        "模型出错（{kind}）；详见服务器日志",
    ),
    "out_of_memory": (
        "the model ran out of memory. Give fewer images, or begin a new conversation",
        "模型内存不足。请减少图像，或开始新对话",
    ),
    "internal": (
        "Something went wrong in the page; the server's log has more.",
        "页面出现错误；详见服务器日志。",
    ),
}


class PageError(GMAIError):
    """A message to who uses the page.

    Args:
        key: of `ERRORS`.
        values: what is filled in.
    """

    def __init__(self, key: str, **values: Any) -> None:
        self.key = key
        self.values = values
        super().__init__(self.said("en"))

    def said(self, language: Language) -> str:
        """In a language."""
        values = dict(self.values)
        if values.get("name") in WORDS:  # of a field of the page
            values["name"] = say(values["name"], language)
        return ERRORS[self.key][language == "zh"].format(**values)


def say(key: str, language: Language, **values: Any) -> str:
    """Words of the page in a language.

    Args:
        key: of `WORDS`.
        language: of the interface.
        values: what is filled in.
    """
    return WORDS[key][language == "zh"].format(**values)
