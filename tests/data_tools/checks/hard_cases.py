# SPDX-License-Identifier: Apache-2.0

"""Sentences that are hard to judge by words, with the verdict that a reader would give.

A case: what the record says, the sentence, and the reason under which it should be refused, None if it should
be accepted. `TUNED` may be looked at when the rules change; `HELD_ASIDE` was written before the rules were
first run and is only counted.
"""
# ruff: noqa: E501 (a sentence stays in one line)

LABEL, OTHER, DENIED = "label not named", "another label claimed", "label denied"
MODALITY, SIDE = "another modality claimed", "side contradicted"

CHEST = ("X-ray", ("cardiomegaly", "nodule", "lung nodule", "normal", "pleural effusion", "pneumonia", "pneumothorax"))  # fmt: skip
SKIN = ("Dermoscopy", ("basal cell carcinoma", "benign nevus", "melanoma", "seborrheic keratosis"))
BLOOD = ("Microscopy", ("platelet", "red blood cell", "white blood cell"))
ORGANS = ("CT", ("kidney", "liver", "liver tumor", "pancreas", "spleen"))
TISSUE = (
    "Pathology",
    ("adenocarcinoma", "lymphocyte", "mucus", "normal colon mucosa", "smooth muscle"),
)
STOMACH = ("CT", ("spleen", "stomach"))
BRAIN = ("MR", ("edema", "enhancing tumor", "glioma", "meningioma", "necrosis", "no tumor"))
EYE = ("Fundus photography", ("diabetic retinopathy", "drusen", "glaucoma", "normal"))

# (set, the record's labels, its side or "", the sentence, the verdict)
TUNED = [
    (CHEST, ["pneumonia"], "", "The chest X-ray shows pneumonia in the lower lobe.", None),
    (CHEST, ["pneumonia"], "", "There is no evidence of pneumonia in this chest film.", DENIED),
    (CHEST, ["pneumonia"], "", "The lungs are clear and the heart is of usual size.", LABEL),
    (CHEST, ["pneumonia"], "", "Pneumonia is present; there is no pleural effusion or pneumothorax.", None),
    (CHEST, ["pneumonia"], "", "Findings of pneumonia without pneumothorax, cardiomegaly or pleural effusion.", None),
    (CHEST, ["pneumonia"], "", "Pneumonia with an accompanying pleural effusion is seen.", OTHER),
    (CHEST, ["pneumonia"], "", "The opacity is compatible with pneumonia rather than a nodule.", None),
    (CHEST, ["pneumonia"], "", "Consolidation due to pneumonia; a pneumothorax is not seen.", None),
    (CHEST, ["pneumonia"], "", "Pneumonia is seen and pneumothorax was ruled out.", None),
    (CHEST, ["pneumonia"], "", "Pneumonia with a normal heart size is shown.", None),
    (CHEST, ["pneumonia"], "", "Both pneumonia and a normal chest radiograph are described.", OTHER),
    (CHEST, ["normal"], "", "This is a normal chest radiograph of an adult.", None),
    (CHEST, ["normal"], "", "The chest radiograph is normal, without pneumonia.", None),
    (CHEST, ["normal"], "", "The radiograph shows cardiomegaly with clear lungs.", LABEL),
    (CHEST, ["lung nodule"], "", "A lung nodule lies in the upper zone.", None),
    (CHEST, ["lung nodule"], "", "Several lung nodules are scattered over both lungs.", None),
    (CHEST, ["nodule"], "", "A lung nodule is seen in this film.", OTHER),
    (CHEST, ["pneumothorax"], "", "Not only a pneumothorax but also a pleural effusion is present.", OTHER),
    (CHEST, ["pneumonia"], "", "This CT scan shows pneumonia in the lower lobe.", MODALITY),
    (CHEST, ["pneumonia"], "", "The radiograph shows pneumonia; a follow-up CT is recommended.", None),
    (CHEST, ["pneumonia"], "left", "Pneumonia of the left lower lobe is seen on this film.", None),
    (CHEST, ["pneumonia"], "left", "Pneumonia of the right lower lobe is seen on this film.", SIDE),
    (CHEST, ["pneumonia"], "left", "The pneumonia lies in the upper right of the image.", None),
    (CHEST, ["pneumonia"], "left", "The pneumonia appears on the right side of the image.", None),
    (CHEST, ["pneumonia"], "left", "The left lung has pneumonia, the right lung is clear.", None),
    (SKIN, ["melanoma"], "", "The dermoscopic image shows a melanoma with an irregular network.", None),
    (SKIN, ["melanoma"], "", "Irregular pigment suggests melanoma; unlike a benign nevus, it is asymmetric.", None),
    (SKIN, ["melanoma"], "", "The lesion is a benign nevus with a regular network.", LABEL),
    (SKIN, ["benign nevus"], "", "A benign nevus, not melanoma, is shown here.", None),
    (SKIN, ["benign nevus"], "", "A benign nevus or perhaps a melanoma is shown here.", OTHER),
    (BLOOD, ["platelet", "red blood cell"], "", "Red blood cells and a platelet are spread over the smear.", None),
    (BLOOD, ["platelet"], "", "Thrombocytes are visible under the microscope.", None),
    (BLOOD, ["red blood cell"], "", "Among the red blood cells lies a white blood cell.", OTHER),
    (ORGANS, ["spleen"], "", "The axial CT slice shows the spleen near the stomach.", None),
    (ORGANS, ["spleen"], "", "The axial MRI slice shows the spleen near the stomach.", MODALITY),
    (ORGANS, ["liver tumor"], "", "A liver tumor is visible in this CT slice.", None),
    (ORGANS, ["liver"], "", "A liver tumor is visible in this CT slice.", OTHER),
    (ORGANS, ["spleen"], "", "Unlike MRI, this CT slice shows the spleen after contrast.", None),
    (TISSUE, ["adenocarcinoma"], "", "The histological section shows adenocarcinoma with irregular glands.", None),
    (TISSUE, ["adenocarcinoma"], "", "Light microscopy of the section shows adenocarcinoma.", None),
    (TISSUE, ["lymphocyte"], "", "Dense groups of lymphocytes surround adenocarcinomata.", OTHER),
    (BRAIN, ["no tumor"], "", "The MR image of the brain shows no tumor.", None),
    (BRAIN, ["meningioma"], "", "An extra-axial meningioma is seen, in contrast to glioma.", None),
    (BRAIN, ["glioma"], "", "Glioma is unlikely in this MR image.", DENIED),
    (EYE, ["glaucoma"], "", "The fundus photograph shows an enlarged cup, as in glaucoma.", None),
    (EYE, ["glaucoma"], "", "OCT shows glaucoma with a thin nerve fibre layer.", MODALITY),
    (CHEST, ["pneumonia"], "", "胸部X光片显示肺炎，未见气胸。", None),
    (CHEST, ["pneumonia"], "", "胸部X光片显示肺炎和气胸。", OTHER),
    (CHEST, ["pneumonia"], "", "胸部X光片未见肺炎。", DENIED),
    (CHEST, ["pneumonia"], "", "该CT图像显示肺炎。", MODALITY),
    (CHEST, ["pneumonia"], "", "X线显示肺炎，建议进一步行CT检查。", None),
    (CHEST, ["pneumonia"], "left", "图像右上方可见肺炎，位于左肺。", None),
    (CHEST, ["pneumonia"], "left", "右肺下叶可见肺炎。", SIDE),
    (CHEST, ["normal"], "", "胸部平片正常，无气胸。", None),
    (CHEST, ["pneumonia"], "", "可见肺炎，气胸已排除。", None),
    (CHEST, ["pneumonia"], "left", "图像右上方可见肺炎。", None),
    (CHEST, ["lung nodule"], "", "A lung nodule is seen; such a nodule may be solid.", None),
    (STOMACH, ["stomach"], "", "The CT slice shows the stomach with the gastric fundus.", None),
]  # fmt: skip

HELD_ASIDE = [
    (CHEST, ["pleural effusion"], "", "Blunting of the costophrenic angle indicates pleural effusion.", None),
    (CHEST, ["pleural effusion"], "", "Pleural effusions are absent and the angles are sharp.", DENIED),
    (CHEST, ["pleural effusion"], "", "A pleural effusion obscures the diaphragm. No pneumothorax.", None),
    (CHEST, ["cardiomegaly"], "", "The heart is enlarged, consistent with cardiomegaly, but the lungs are free of pneumonia.", None),
    (CHEST, ["cardiomegaly"], "", "Cardiomegaly is noted; pneumonia cannot be excluded.", OTHER),
    (CHEST, ["cardiomegaly"], "", "The cardiac silhouette is normal in this film.", LABEL),
    (CHEST, ["pneumothorax"], "right", "A pneumothorax is visible on the right.", None),
    (CHEST, ["pneumothorax"], "right", "A left-sided pneumothorax is visible.", SIDE),
    (CHEST, ["pneumothorax"], "right", "The trachea is pushed to the left by a pneumothorax.", None),
    (CHEST, ["pneumothorax"], "right", "Pneumothorax in the left part of the picture, which is the patient's right.", None),
    (CHEST, ["normal"], "", "Normal study with neither pneumonia nor effusion.", None),
    (CHEST, ["normal"], "", "No abnormality is seen; heart and lungs are normal.", None),
    (CHEST, ["pneumonia"], "", "Ultrasound of the chest shows pneumonia.", MODALITY),
    (CHEST, ["pneumonia"], "", "Compared with the previous CT, the radiograph shows pneumonia.", None),
    (CHEST, ["nodule"], "", "A single nodule without calcification is present.", None),
    (SKIN, ["seborrheic keratosis"], "", "Milia-like cysts are typical of seborrheic keratosis, which can mimic melanoma.", None),
    (SKIN, ["seborrheic keratosis"], "", "Seborrheic keratoses have a stuck-on look.", None),
    (SKIN, ["basal cell carcinoma"], "", "Arborizing vessels support basal cell carcinoma instead of melanoma.", None),
    (SKIN, ["basal cell carcinoma"], "", "It could be melanoma; basal cell carcinoma is less likely.", OTHER),
    (SKIN, ["melanoma"], "", "A clinical photograph of a melanoma is shown.", None),
    (BLOOD, ["white blood cell"], "", "One leukocyte with a lobed nucleus lies in the field.", None),
    (BLOOD, ["white blood cell"], "", "A white blood cell among numerous erythrocytes is shown.", OTHER),
    (BLOOD, ["red blood cell"], "", "Red blood cells only; white blood cells are not present.", None),
    (ORGANS, ["kidney"], "left", "The left kidney is outlined in this CT slice.", None),
    (ORGANS, ["kidney"], "left", "The right kidney is outlined in this CT slice.", SIDE),
    (ORGANS, ["pancreas"], "", "The pancreas lies in front of the spleen in this CT slice.", OTHER),
    (ORGANS, ["liver"], "", "CT angiography of the abdomen shows the liver.", None),
    (TISSUE, ["normal colon mucosa"], "", "Normal colon mucosa with regular crypts; no adenocarcinoma.", None),
    (TISSUE, ["mucus"], "", "Pools of mucus stain pale in this H&E section.", None),
    (TISSUE, ["smooth muscle"], "", "Bundles of smooth muscle, free of adenocarcinoma, cross the slide.", None),
    (TISSUE, ["smooth muscle"], "", "An endoscopic image of smooth muscle is shown.", MODALITY),
    (BRAIN, ["edema"], "", "T2 hyperintense edema surrounds the ventricle on MRI.", None),
    (BRAIN, ["edema"], "", "Edema surrounds an enhancing tumor with necrosis on MRI.", OTHER),
    (BRAIN, ["no tumor"], "", "The brain MRI is unremarkable, with no tumor.", None),
    (BRAIN, ["no tumor"], "", "A glioma is seen on the brain MRI.", LABEL),
    (EYE, ["diabetic retinopathy"], "", "Microaneurysms indicate diabetic retinopathy in this fundus image.", None),
    (EYE, ["drusen"], "right", "Drusen near the macula of the right eye.", None),
    (EYE, ["drusen"], "right", "Drusen are scattered near the macula of the left eye.", SIDE),
    (EYE, ["glaucoma"], "", "Glaucoma is suspected; OCT could confirm it.", None),
    (EYE, ["normal"], "", "The fundus appears normal and shows no drusen.", None),
    (CHEST, ["pleural effusion"], "", "平片示胸腔积液，心影增大不明显。", None),
    (CHEST, ["pleural effusion"], "", "平片未见胸腔积液。", DENIED),
    (CHEST, ["pneumothorax"], "right", "右侧气胸，左肺未见异常。", None),
    (CHEST, ["pneumothorax"], "right", "左侧气胸，肺组织受压。", SIDE),
    (CHEST, ["pneumothorax"], "", "磁共振图像显示气胸。", MODALITY),
    (CHEST, ["nodule"], "", "可见结节，不考虑肺炎。", None),
    (CHEST, ["nodule"], "", "可见结节，合并肺炎。", OTHER),
]  # fmt: skip
SYNONYMS = {
    "platelet": ("thrombocyte",),
    "white blood cell": ("leukocyte", "WBC"),
    "red blood cell": ("erythrocyte",),
    "pleural effusion": ("effusion",),
}
CHINESE = {
    "pneumonia": "肺炎", "pneumothorax": "气胸", "pleural effusion": "胸腔积液", "nodule": "结节",
    "normal": "正常", "cardiomegaly": "心脏增大",
}  # fmt: skip
