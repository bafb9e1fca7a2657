"""The models of ``python -m braze.benchmarks audit``: small members of as many families as there are."""

from __future__ import annotations

#: Images are square, of this side, where the model takes any.
SIDE = 128

#: Sides of models of torchvision that do not take ``SIDE``; timm's say themselves what they take.
SIDES = {"torchvision:maxvit_t": 224, "torchvision:vit_b_32": 224}

TORCHVISION = """
alexnet convnext_tiny deeplabv3_mobilenet_v3_large deeplabv3_resnet50 densenet121 efficientnet_b0 efficientnet_v2_s
fcn_resnet50 googlenet lraspp_mobilenet_v3_large maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_large
mobilenet_v3_small r3d_18 regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5
shufflenet_v2_x1_0 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 wide_resnet50_2
"""

TIMM = """
bat_resnext26ts botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_0_rw_224 convformer_s18 convit_tiny
convmixer_768_32 convnextv2_atto crossvit_tiny_240 cs3darknet_s cspresnet50 darknet21 davit_tiny deit3_small_patch16_224
dla34 dpn48b eca_botnext26ts_256 eca_nfnet_l0 edgenext_x_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0
efficientvit_m0 ese_vovnet19b_dw fastvit_t8 fbnetc_100 focalnet_tiny_srf gcresnet33ts gcvit_xxtiny gernet_s ghostnet_050
ghostnetv2_100 gmixer_24_224 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_tiny
lambda_resnet26t lcnet_050 levit_128s mambaout_femto maxvit_rmlp_pico_rw_256 mixnet_s mobilenetv4_conv_small
mobilenetv4_hybrid_medium mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nf_resnet26 pit_ti_224
poolformer_s12 pvt_v2_b0 regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resmlp_12_224 resnest14d
resnest26d resnet26d resnetv2_50 rexnet_100 sehalonet33ts selecsls42b seresnet18 skresnet18 starnet_s1
swiftformer_xs swin_tiny_patch4_window7_224 tf_efficientnet_lite0 tinynet_e tiny_vit_5m_224 tresnet_m twins_pcpvt_small
vit_tiny_patch16_224 vitamin_small_224 visformer_tiny volo_d1_224 xception41 xcit_nano_12_p16_224 xcit_tiny_12_p8_224
"""

#: Every model, as :func:`braze.layouts.specifier.build` names it.
MODELS = [f"torchvision:{name}" for name in TORCHVISION.split()] + [f"timm:{name}" for name in TIMM.split()]

#: For ``--quick``: one that keeps its layout, one that loses it, one that crashes.
QUICK = ["torchvision:resnet18", "torchvision:shufflenet_v2_x0_5", "timm:repvgg_a0"]
