"""The text on which the tiny tokenizer is trained: medical English and Chinese, made in place.

Written for this project; sentences are put together from short lists, so that frequent words
become single pieces and the whole stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

MODALITIES = (
    ("a CT scan", "CT"),
    ("an MR image", "磁共振"),
    ("a chest X-ray", "胸部X光片"),
    ("a colour fundus photograph", "眼底彩照"),
    ("a histopathology patch", "病理切片"),
    ("an ultrasound image", "超声"),
    ("an endoscopy frame", "内镜"),
    ("a dermoscopy image", "皮肤镜"),
    ("an OCT scan", "光学相干断层扫描"),
    ("a microscopy image", "显微镜图像"),
    ("a PET scan", "正电子发射断层扫描"),
    ("a mammogram", "乳腺钼靶"),
)
ORGANS = (
    ("brain", "大脑"),
    ("lung", "肺"),
    ("liver", "肝脏"),
    ("kidney", "肾脏"),
    ("heart", "心脏"),
    ("retina", "视网膜"),
    ("optic disc", "视盘"),
    ("skin", "皮肤"),
    ("breast", "乳腺"),
    ("colon", "结肠"),
    ("stomach", "胃"),
    ("spine", "脊柱"),
    ("prostate", "前列腺"),
    ("spleen", "脾脏"),
    ("pancreas", "胰腺"),
    ("bone", "骨骼"),
    ("thyroid", "甲状腺"),
    ("blood vessel", "血管"),
)
FINDINGS = (
    ("no abnormality", "未见异常"),
    ("a nodule", "结节"),
    ("a mass", "肿块"),
    ("a cyst", "囊肿"),
    ("a polyp", "息肉"),
    ("a fracture", "骨折"),
    ("haemorrhage", "出血"),
    ("oedema", "水肿"),
    ("pneumonia", "肺炎"),
    ("pleural effusion", "胸腔积液"),
    ("a tumour", "肿瘤"),
    ("an infarct", "梗死"),
    ("diabetic retinopathy", "糖尿病视网膜病变"),
    ("glaucoma", "青光眼"),
    ("adenocarcinoma", "腺癌"),
    ("melanoma", "黑色素瘤"),
    ("inflammation", "炎症"),
    ("calcification", "钙化"),
)
ENGLISH = (
    "What imaging modality was used to take this image?",
    "Which modality is shown here? Answer with one word.",
    "Which of the following best describes the image?",
    "Answer with the letter of the right option from the given choices directly.",
    "Answer the question using a single word or phrase.",
    "Describe the image in detail. Please describe what you see in this picture.",
    "Is there anything abnormal in this image? Yes. No. Normal. Abnormal.",
    "You are a helpful medical assistant. This answer does not replace a doctor.",
    "The patient is a 65 year old man with cough, fever and shortness of breath.",
    "The patient is a 42 year old woman with headache and blurred vision for 3 weeks.",
    "The image shows the left side and the right side, the upper lobe and the lower lobe.",
    "The slice is taken in the axial plane; the coronal and sagittal planes are not shown.",
    "The lesion is round, well defined, about 12 mm across and brighter than its surroundings.",
    "The lesion is irregular, poorly defined and darker than the tissue around it.",
    "Where in the body was this image taken? Head, neck, chest, abdomen, pelvis, arm or leg.",
    "How many lesions can be seen? One, two, three, four, five or none.",
    "There is one region of interest. It lies in the centre of the image, near the border.",
    "What is the most likely diagnosis? What treatment would you suggest next?",
    "Which stain was used? Haematoxylin and eosin. The nuclei are purple, the stroma is pink.",
    "The optic disc, the macula and the vessels can be seen in the fundus photograph.",
    "The background is dark, the bright area is bone, the grey area is soft tissue.",
    "Immunohistochemistry shows brown staining of the glands; the lumen is white.",
    "Bounding box: [10, 24, 136, 248]. Coordinates are given in pixels from 0 to 1000.",
    "A. CT B. MR C. fundus D. histology E. X-ray F. ultrasound",
    "(A) yes (B) no (C) cannot be determined (D) none of the above",
    "Compare the first image with the second image and say what has changed.",
    "Follow up in 6 months is recommended, because the finding is probably benign.",
    "The finding suggests a malignant process, therefore a biopsy should be taken.",
    "Blood pressure 120/80 mmHg, temperature 37.5 degrees, heart rate 72 per minute.",
    "Train, test and validation images come from different regions and different patients.",
)
CHINESE = (
    "这张图像是用什么成像方式拍摄的?请用一个词回答。",
    "图中显示的是哪个器官?请从下列选项中选择正确的答案。",
    "请详细描述这张医学图像。请描述你在图片中看到的内容。",
    "这张图像中有异常吗?有。没有。是。否。正常。异常。",
    "你是一名有帮助的医学助手。本回答不能代替医生的诊断。",
    "患者,男,六十五岁,因咳嗽、发热、呼吸困难入院。",
    "患者,女,四十二岁,头痛、视物模糊三周。",
    "病灶呈圆形,边界清楚,直径约12毫米,信号高于周围组织。",
    "病灶形态不规则,边界不清,密度低于周围组织。",
    "最可能的诊断是什么?下一步应如何治疗?",
    "图像为横断面,未显示冠状面和矢状面。",
    "左侧、右侧、上叶、下叶、前方、后方、中央、边缘。",
    "细胞核呈紫色,间质呈粉红色,腺体排列紊乱。",
    "眼底彩照可见视盘、黄斑和血管,未见明显出血。",
    "建议六个月后复查,必要时进行活检。",
    "该表现提示恶性病变,应进一步检查。",
    "背景为黑色,亮区为骨骼,灰色区域为软组织。",
    "请比较第一张图像和第二张图像,说明有什么变化。",
    "选项:一、二、三、四、五、六、七、八、九、十。",
    "血压一百二十,体温三十七度,心率每分钟七十二次。",
)


def sentences() -> Iterator[str]:
    """Sentences in a fixed order, each without a line break."""
    for _ in range(8):
        yield from ENGLISH
        yield from CHINESE
    for (modality, image), (organ, part) in product(MODALITIES, ORGANS):
        yield f"This is {modality} of the {organ}. What does the image show?"
        yield f"这是一张{part}的{image}图像。图像显示了什么?"
    for (organ, part), (finding, sign) in product(ORGANS, FINDINGS):
        yield f"The {organ} shows {finding}. There is {finding} in the {organ}."
        yield f"{part}可见{sign}。{part}:{sign}。"
