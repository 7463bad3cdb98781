"""The papers whose equations are computed here, with their equations in order and the differences.

A number is listed only where it is known from the paper. A note gives the reason where an equation is not computed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Numbered:
    """An equation in the numbering of its paper.

    Args:
        number: as in a tag: "7" is DDPM (7).
        what: description.
        note: the differences here, with reasons; or, where no docstring quotes it, why it is not computed.
        verified: False where the number was not found in a second public text.
    """

    number: str
    what: str = ""
    note: str = ""
    verified: bool = True


@dataclass(frozen=True)
class Paper:
    """A paper, identified by its name in tags.

    Args:
        name: of tags.
        title, authors, year, arxiv: as printed; no number for what is not on arXiv.
        letters: differences of its notation from ours.
        equations: in the paper's order; tags that are not listed here follow in the order of their names.
    """

    name: str
    title: str
    authors: str
    year: int
    arxiv: str = ""
    letters: str = ""
    equations: tuple[Numbered, ...] = ()


N = Numbered
PAPERS = (
    Paper(
        "DDPM",
        "Denoising Diffusion Probabilistic Models",
        "Ho, Jain & Abbeel",
        2020,
        "2006.11239",
        "The code has its letters. Here t = 0 is data and every constant has an entry 0, so that t = 1 needs "
        "no case of its own.",
        (
            N(
                "1",
                "The reverse process: a chain of Gaussians from x_T to x_0.",
                "Nothing computes the product: a sampler takes its steps one by one. Mean and variance of a "
                "step are `mu_theta` and `variance`.",
            ),
            N("2", "One step of the forward process."),
            N(
                "3",
                "The variational bound on the negative log likelihood, as an expectation of log ratios.",
                "It is computed in the form of (5), whose terms vary less from draw to draw.",
            ),
            N(
                "4",
                "x_t at any t directly from data.",
                "Real t are allowed, too: the schedule interpolates the log-SNR.",
            ),
            N(
                "5",
                "The bound as divergences: L_T, L_{t-1} and L_0.",
                "In bits per dimension, where the paper has nats. L_{t-1} is quoted as (8), L_0 as (13).",
            ),
            N("6", "The posterior of a step, whose data is known."),
            N(
                "7",
                "Its mean and variance.",
                "A longer stride, from t to any earlier s, has the same form: samplers skip times.",
            ),
            N(
                "8",
                "L_{t-1} as the distance of two means.",
                "With its constant C, which is none where the variance is learned.",
            ),
            N("9", "The same with x_t written by x_0 and eps.", "A step of the derivation of (12)."),
            N("10", "The same with the posterior's mean written by eps.", "A step of the derivation of (12)."),
            N(
                "11",
                "The mean of a step back, by predicted noise.",
                "Computed from the predicted x_0, which is the same, exists for every target and can be clipped.",
            ),
            N("12", "L_{t-1} as the squared error of the noise."),
            N("13", "The last step: bytes read out of a Gaussian."),
            N(
                "14",
                "The simple loss.",
                "A mean over the dimensions where the paper has a sum: a learning rate then does not depend on "
                "the size of images.",
            ),
            N("15", "Data, predicted from predicted noise."),
            N(
                "16",
                "The bound as a difference of divergences and an entropy.",
                "Not quoted under this number; `bits_lost` computes it term by term, where the density of data "
                "is known.",
            ),
            N(
                "Algorithm 1",
                "Training.",
                "The training task draws t and eps and takes `L_simple`; its loop is that of every task.",
            ),
            N(
                "Algorithm 2",
                "Sampling.",
                "Clipped predictions of x_0 are on by default, as in the authors' code, and the last step adds "
                "no noise.",
            ),
        ),
    ),
    Paper(
        "iDDPM",
        "Improved Denoising Diffusion Probabilistic Models",
        "Nichol & Dhariwal",
        2021,
        "2102.09672",
        "As DDPM. Most of what comes before (15) repeats DDPM's equations, and is computed under DDPM's numbers.",
        (
            N("4", "The variational bound, term by term."),
            N("5", "L_0, the last step.", "Computed as DDPM (13).", False),
            N("6", "L_{t-1}, a step's divergence.", "Computed as DDPM (8)."),
            N("7", "L_T, the prior's.", "Computed as DDPM (5).", False),
            N("8", "x_t at any t directly from data.", "Computed as DDPM (4).", False),
            N("10", "The variance of the posterior.", "Computed as DDPM (7)."),
            N("11", "Its mean.", "Computed as DDPM (7)."),
            N("12", "The posterior of a step.", "Computed as DDPM (6).", False),
            N("13", "The mean of a step back, by predicted noise.", "Computed as DDPM (11).", False),
            N("14", "The simple loss.", "Computed as DDPM (14).", False),
            N(
                "15",
                "A learned variance, between beta_tilde and beta.",
                "v is the network's output, mapped from [-1, 1] to [0, 1], as in the authors' code; at t = 1 "
                "beta_tilde is 0, and that of t = 2 stands in.",
            ),
            N("16", "The hybrid loss.", "The bound sends no gradient to the mean, as the paper says in words."),
            N(
                "17",
                "The cosine schedule.",
                "Betas are clipped to 0.999, as in the paper's text. Some copies count it as (16).",
            ),
            N("18", "Times drawn by their losses.", "Ten losses a time are stored, as in the paper's text.", False),
            N("19", "The betas of a shorter chain.", "", False),
        ),
    ),
    Paper(
        "DDIM",
        "Denoising Diffusion Implicit Models",
        "Song, Meng & Ermon",
        2020,
        "2010.02502",
        "The paper's alpha is our alpha_bar; its times tau are our pairs (t, s).",
        (
            N("4", "x_t directly from data.", "Computed as DDPM (4)."),
            N("5", "The loss, weighted over t.", "Computed as DDPM (14), whose weights are all 1, or by a weighting."),
            N(
                "7",
                "The posterior of a step that is not Markovian.",
                "A step of (12) is drawn from it, with the predicted x_0 in place of x_0.",
                False,
            ),
            N("9", "Data, predicted from predicted noise.", "Computed as DDPM (15)."),
            N("10", "The reverse process.", "A sampler takes its steps one by one, as (12).", False),
            N(
                "11",
                "The bound of these processes.",
                "It differs from (5) by its weights alone, and is not computed.",
                False,
            ),
            N("12", "A step of the generalised reverse process.", "The noise of the last step is none: t = 0 is data."),
            N("13", "The same step, with eta = 0, as one of Euler's method.", "Computed as (12).", False),
            N(
                "14",
                "The ordinary differential equation that a step with eta = 0 is an Euler step of.",
                "Walked upwards, it encodes an image.",
            ),
            N(
                "16",
                "How much noise a step adds, by eta.",
                "For any pair (t, s), not only times that follow each other.",
            ),
            N("App. D.5", "Interpolation along an arc.", "Latents in the same direction are joined by a line."),
        ),
    ),
    Paper(
        "DPM-Solver++",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        "Lu, Zhou, Bao, Chen, Li & Zhu",
        2022,
        "2211.01095",
        "The paper's alpha and sigma are our sqrt(alpha_bar) and sqrt(1 - alpha_bar); its lambda is ours.",
        (
            N("order 1", "A step of first order, which is DDIM."),
            N(
                "Algorithm 1",
                "2S: a second evaluation within the step.",
                "The point in the middle is halfway in t, not in lambda, so that it lies on the integer grid.",
                False,
            ),
            N(
                "Algorithm 2",
                "2M: the step before in place of a second evaluation.",
                "The last step is of first order.",
            ),
            N(
                "3M",
                "Three steps.",
                "The second derivative is twice the divided difference: with that difference alone the order "
                "falls to 2, as the test shows.",
            ),
            N("SDE", "The same for the stochastic equation."),
        ),
    ),
    Paper(
        "EDM",
        "Elucidating the Design Space of Diffusion-Based Generative Models",
        "Karras, Aittala, Aila & Laine",
        2022,
        "2206.00364",
        "The paper's time is the noise level sigma, its data is y and its denoiser D; our sqrt((1 - alpha_bar) "
        "/ alpha_bar) is sigma, and x / sqrt(alpha_bar) its x.",
        (
            N(
                "1",
                "The probability flow with sigma as its time.",
                "A sampler takes steps of it; the flow itself is in `log_likelihood`, in lambda.",
            ),
            N("2", "The denoiser as a least-squares answer.", "That is how every network is trained; see (8)."),
            N("3", "The score from the denoiser.", "Computed as a score from predicted noise, `score_at_sigma`."),
            N(
                "4",
                "The flow with a scale s(t).",
                "Our scale is sqrt(alpha_bar); it is undone where a method works in sigma.",
            ),
            N(
                "5",
                "Noise levels even in the seventh root.",
                "Its ends are those of the schedule, sigma at t = T and at t = 1.",
            ),
            N("6", "The stochastic equation.", "Noise is added as Algorithm 2 does it."),
            N("7", "The denoiser around the network."),
            N("8", "The loss as the squared error of the network's own output."),
            N(
                "table 1",
                "The scales c_skip, c_out, c_in and c_noise.",
                "A network that takes our t is conditioned not on c_noise, but on the t of this noise level.",
            ),
            N("noise levels", "Levels that are lognormal.", "Rounded to times of the schedule."),
            N("Algorithm 1", "Heun's method."),
            N("Algorithm 2", "Churn: noise is added before a step."),
        ),
    ),
    Paper(
        "UniPC",
        "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
        "Zhao, Bai, Rao, Zhou & Lu",
        2023,
        "2302.04867",
        "As DPM-Solver++.",
    ),
    Paper(
        "ScoreSDE",
        "Score-Based Generative Modeling through Stochastic Differential Equations",
        "Song, Sohl-Dickstein, Kingma, Kumar, Ermon & Poole",
        2020,
        "2011.13456",
        "Our process is the discrete variance-preserving one; real t are times between its steps.",
        (
            N(
                "5",
                "A stochastic equation that turns data into noise.",
                "The forward process here is discrete: DDPM (2), and (4) at real t.",
            ),
            N("6", "The reverse of it.", "Samplers with noise take steps of it."),
            N("7", "Denoising score matching over times.", "Computed as NCSN (6), or as DDPM (14)."),
            N(
                "9",
                "The variance-exploding equation.",
                "The schedules `sigmas` and `geometric` are its discrete form, scaled to unit noise.",
            ),
            N("11", "The variance-preserving equation.", "DDPM's process is its discrete form."),
            N("12", "The sub-variance-preserving equation.", "No schedule here has this process.", False),
            N("13", "The probability flow.", "DDIM with eta = 0 takes Euler steps of it."),
            N(
                "14",
                "The reverse equation, given a condition.",
                "Guidance by a classifier adds the same gradient to the prediction: ADM (14).",
                False,
            ),
            N(
                "39",
                "The likelihood along the probability flow.",
                "Integrated in lambda, where nothing is steep; Runge-Kutta steps of fixed size.",
            ),
            N("40", "The divergence by random probes."),
        ),
    ),
    Paper(
        "CFG",
        "Classifier-Free Diffusion Guidance",
        "Ho & Salimans",
        2022,
        "2207.12598",
        "The paper's weight is ours minus 1: w = 1 is the conditional model here.",
        (
            N(
                "6",
                "The guided prediction.",
                "w counts from the unconditional prediction, so that 0 ignores the condition.",
            ),
        ),
    ),
    Paper(
        "ADM",
        "Diffusion Models Beat GANs on Image Synthesis",
        "Dhariwal & Nichol",
        2021,
        "2105.05233",
        "As DDPM.",
        (
            N(
                "14",
                "Noise, tilted by a classifier.",
                "",
            ),
        ),
    ),
    Paper(
        "AutoGuidance",
        "Guiding a Diffusion Model with a Bad Version of Itself",
        "Karras, Aittala, Kynkäänniemi, Lehtinen, Aila & Laine",
        2024,
        "2406.02507",
        letters=(
            "The paper's D is our predicted x_0. Noise is combined with the same w, which is the same: both are "
            "affine in each other."
        ),
    ),
    Paper(
        "Lin",
        "Common Diffusion Noise Schedules and Sample Steps are Flawed",
        "Lin, Liu, Li & Yang",
        2023,
        "2305.08891",
        letters=(
            "The paper's phi is `rescale`. The deviation is of the network's own target, over all of an image, "
            "and a picture that is even stays as it is. Its trailing steps are our uniform ones, for our t = 0 is "
            "data."
        ),
    ),
    Paper(
        "LDM",
        "High-Resolution Image Synthesis with Latent Diffusion Models",
        "Rombach, Blattmann, Lorenz, Esser & Ommer",
        2021,
        "2112.10752",
        "",
        (
            N("1", "The loss of a diffusion model.", "Computed as DDPM (14)."),
            N("2", "The same for latents.", "The loss is the same function, applied to latents of a `Codec`."),
            N(
                "3",
                "The same with a condition.",
                "A condition is an argument of the network; the loss does not depend on it.",
            ),
            N("scaled latents", "Latents of unit variance.", "The mean is taken off, too; the paper has m = 0."),
            N("cross-attention", "Pixels that attend to tokens."),
        ),
    ),
    Paper(
        "PD",
        "Progressive Distillation for Fast Sampling of Diffusion Models",
        "Salimans & Ho",
        2022,
        "2202.00512",
        "Its alpha and sigma are our roots of alpha_bar and 1 - alpha_bar.",
    ),
    Paper(
        "CM",
        "Consistency Models",
        "Song, Dhariwal, Chen & Sutskever",
        2023,
        "2303.01469",
        letters=(
            "The paper's time is the noise level. Here the boundary is that of target v or flow, or of EDM's "
            "scales; a walk is in our coordinates, over the times that training cuts the way into."
        ),
    ),
    Paper(
        "iCT",
        "Improved Techniques for Training Consistency Models",
        "Song & Dhariwal",
        2023,
        "2310.14189",
        letters=(
            "The sums are over a row, so that c grows with the root of its size. The levels are those of EDM's "
            "spacing, as far as the schedule reaches; neighbours share x_0 and noise, or follow a teacher."
        ),
    ),
    Paper(
        "VDM",
        "Variational Diffusion Models",
        "Kingma, Salimans, Poole & Ho",
        2021,
        "2107.00630",
        letters=(
            "Our lambda is half of its log-SNR. Its continuous bound and its learned schedule are not computed "
            "here: weights and errors are taken at the SNR of a fixed schedule."
        ),
    ),
    Paper(
        "Min-SNR",
        "Efficient Diffusion Training via Min-SNR Weighting Strategy",
        "Hang et al.",
        2023,
        "2303.09556",
        letters=(
            "The weight applies to the squared error of x_0; for that of noise it is divided by the SNR. gamma is an "
            "option, `loss` names the weighting."
        ),
    ),
    Paper(
        "P2",
        "Perception Prioritized Training of Diffusion Models",
        "Choi et al.",
        2022,
        "2204.00227",
        letters=(
            "The paper's lambda_t is the weight of the simple loss of noise, which for the error of x_0 is the "
            "SNR; k and gamma are options."
        ),
    ),
    Paper(
        "Chen",
        "On the Importance of Noise Scheduling for Diffusion Models",
        "Chen",
        2023,
        "2301.10972",
        letters=(
            "beta is clipped as for the cosine schedule, and computed from alpha_bar at whole times. Its scaling "
            "of the input is not computed here."
        ),
    ),
    Paper(
        "FM",
        "Flow Matching for Generative Modeling",
        "Lipman, Chen, Ben-Hamu, Nickel & Le",
        2022,
        "2210.02747",
        letters=(
            "There t = 1 is data and the velocity points to it; here u = eps - x_0 points to noise. The straight "
            "path is walked by every schedule, at a pace of its own, so no path of its own is needed."
        ),
    ),
    Paper(
        "PNDM",
        "Pseudo Numerical Methods for Diffusion Models on Manifolds",
        "Liu, Ren, Lin & Zhao",
        2022,
        "2202.09778",
        letters=(
            "The first step is an improved Euler's in place of three Runge-Kutta steps, as in published samplers "
            "that skip those. Times need not be evenly spaced, but the mixtures are those of even ones."
        ),
    ),
    Paper(
        "k-diffusion",
        "k-diffusion, a library",
        "Crowson",
        2022,
        letters=(
            "A library, whose method is quoted by name. The integrals of the polynomials are exact here; with one "
            "prediction it is DDIM."
        ),
    ),
    Paper(
        "NCSN",
        "Generative Modeling by Estimating Gradients of the Data Distribution",
        "Song & Ermon",
        2019,
        "1907.05600",
        "The paper counts its levels from the most noise down; here t = 1 has the least.",
    ),
    Paper(
        "Hyvarinen",
        "Estimation of Non-Normalized Statistical Models by Score Matching",
        "Hyvärinen",
        2005,
        letters=(
            "Means over a batch are left to the caller: each function gives a number a row. The trace is exact, "
            "by forward derivatives."
        ),
    ),
    Paper(
        "SSM",
        "Sliced Score Matching",
        "Song, Garg, Shi & Ermon",
        2019,
        "1905.07088",
        letters=("Directions are arguments, one a row; the paper's mean over several is the mean over repeated rows."),
    ),
    Paper(
        "FD-SSM",
        "Efficient Learning of Generative Models via Finite-Difference Score Matching",
        "Pang et al.",
        2020,
        "2007.03317",
        letters=(
            "There v has the length of the step and the objective is h squared times as large; here the step is "
            "an argument of its own."
        ),
    ),
    Paper(
        "MALA",
        "Exponential Convergence of Langevin Distributions and Their Discrete Approximations",
        "Roberts & Tweedie",
        1996,
        letters=("The step size h is the variance of the proposal's noise; the drift is half of it times the score."),
    ),
    Paper(
        "SDEdit",
        "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations",
        "Meng et al.",
        2021,
        "2108.01073",
        letters=(
            "Written for the variance-preserving process; strength names the share of the sampler's own steps "
            "that are walked, and t_0 is one of its times."
        ),
    ),
    Paper(
        "RePaint",
        "RePaint: Inpainting using Denoising Diffusion Probabilistic Models",
        "Lugmayr et al.",
        2022,
        "2201.09865",
        letters=(
            "The paper's mask is 1 where pixels are known, ours where they are drawn. Steps may be those of any "
            "sampler; its jump is counted in them."
        ),
    ),
    Paper(
        "DPS",
        "Diffusion Posterior Sampling for General Noisy Inverse Problems",
        "Chung et al.",
        2022,
        "2209.14687",
        letters=(
            "The gradient is added to the score before the step, not to the step's result, and rho is a number, "
            "not divided by the norm of the error."
        ),
    ),
    Paper(
        "PiGDM",
        "Pseudoinverse-Guided Diffusion Models for Inverse Problems",
        "Song, Vahdat, Mardani & Kautz",
        2023,
        letters=(
            "The data's variance is an argument; the paper has 1. For Gaussian data of that variance the guided "
            "prediction is exact, as the test shows."
        ),
    ),
    Paper(
        "VAE",
        "Auto-Encoding Variational Bayes",
        "Kingma & Welling",
        2013,
        "1312.6114",
        letters=(
            "Of the bound its negative is trained, with one draw. Pixels run from -1 to 1, so that a Bernoulli's "
            "are read as (x + 1) / 2; bytes have a logistic of their own, see IAF."
        ),
    ),
    Paper(
        "IWAE",
        "Importance Weighted Autoencoders",
        "Burda, Grosse & Salakhutdinov",
        2015,
        "1509.00519",
        letters=(
            "The bound is measured, not trained. log p(z) - log q(z) is taken in closed form from the draw's own noise."
        ),
    ),
    Paper(
        "IAF",
        "Improving Variational Inference with Inverse Autoregressive Flow",
        "Kingma et al.",
        2016,
        "1606.04934",
        letters=(
            "Of the paper only free bits and the logistic likelihood of bytes are here; its flow is not. A coding "
            "is free where its mean over the batch is."
        ),
    ),
    Paper(
        "PPCA",
        "Probabilistic Principal Component Analysis",
        "Tipping & Bishop",
        1999,
        letters=(
            "The best linear Gaussian autoencoder has the likelihood of this model; the posterior's variances are "
            "one a coding, for all data."
        ),
    ),
    Paper(
        "VQ-VAE",
        "Neural Discrete Representation Learning",
        "van den Oord, Vinyals & Kavukcuoglu",
        2017,
        "1711.00937",
        letters=(
            "The distances are means over the numbers of a sample, not sums, and -log p is minimised. Averages in "
            "place of the second part are smoothed as in the authors' code; codes that stand for nothing may be "
            "revived."
        ),
    ),
    Paper(
        "PixelCNN",
        "Conditional Image Generation with PixelCNN Decoders",
        "van den Oord et al.",
        2016,
        "1606.05328",
        letters=(
            "Codes take the place of pixels: their number is an argument. Masks are no masks: what a kernel may "
            "not see is not there."
        ),
    ),
    Paper(
        "VQGAN",
        "Taming Transformers for High-Resolution Image Synthesis",
        "Esser, Rombach & Ommer",
        2020,
        "2012.09841",
        letters=("The weight is bounded and sends no gradient; delta is 1e-6."),
    ),
    Paper(
        "GAN",
        "Generative Adversarial Networks",
        "Goodfellow et al.",
        2014,
        "1406.2661",
        letters=(
            "The game is split in the two losses that are minimised, on logits. The generator's is the one that "
            "does not saturate; the other is not trained."
        ),
    ),
    Paper(
        "GeometricGAN",
        "Geometric GAN",
        "Lim & Ye",
        2017,
        "1705.02894",
        letters=("On logits of patches, of which the mean is taken."),
    ),
    Paper(
        "R1",
        "Which Training Methods for GANs do actually Converge?",
        "Mescheder, Geiger & Nowozin",
        2018,
        "1801.04406",
        letters=(
            "The norm is over all of x, the output a mean over patches. gamma may be 1, with the strength as the "
            "weight of a part."
        ),
    ),
    Paper(
        "cGAN",
        "cGANs with Projection Discriminator",
        "Miyato & Koyama",
        2018,
        "1802.05637",
        letters=("Without spectral norms and without batch norms: a row's logit depends on no other row."),
    ),
    Paper(
        "LPIPS",
        "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
        "Zhang et al.",
        2018,
        "1801.03924",
        letters=(
            "The network may be the project's own classifier, with every weight 1. Published weights are w "
            "squared, as they are stored."
        ),
    ),
    Paper(
        "PatchGAN",
        "Image-to-Image Translation with Conditional Adversarial Networks",
        "Isola, Zhu, Zhou & Efros",
        2016,
        "1611.07004",
        letters=(
            "Group norms, or none, in place of batch norms, so that no row depends on another; as many layers as "
            "leave a patch within the image."
        ),
    ),
    Paper(
        "SSIM",
        "Image Quality Assessment: From Error Visibility to Structural Similarity",
        "Wang, Bovik, Sheikh & Simoncelli",
        2004,
        letters=(
            "The range of data is 2. A window has 11 x 11 pixels, or the largest odd number that fits, and only "
            "whole windows count; one minus it is the loss."
        ),
    ),
    Paper(
        "Focal",
        "Focal Loss for Dense Object Detection",
        "Lin et al.",
        2017,
        "1708.02002",
        letters=(
            "Over two classes, black and white; a grey pixel is their expectation. There is no balance between classes."
        ),
    ),
    Paper(
        "DiT",
        "Scalable Diffusion Models with Transformers",
        "Peebles & Xie",
        2022,
        "2212.09748",
        letters=(
            "Frequencies of positions are those of MAE, column before row. The network is conditioned on our t, "
            "and predicts the target of the diffusion."
        ),
    ),
    Paper(
        "EDM2",
        "Analyzing and Improving the Training Dynamics of Diffusion Models",
        "Karras, Aittala, Lehtinen, Hellsten, Aila & Laine",
        2023,
        "2312.02696",
        letters=(
            "The network is conditioned on our t by fixed sines and cosines, not on a noise level by random ones. "
            "Stored weights get their norm back after the optimizer's step, not in the forward pass. Averages are put "
            "together from snapshots whose shares add up to 1."
        ),
    ),
    Paper(
        "CLIP",
        "Learning Transferable Visual Models From Natural Language Supervision",
        "Radford et al.",
        2021,
        "2103.00020",
        letters=(
            "Pictures are read by the way down of a U-Net. Another pair with the same text is no wrong answer. "
            "The scale stays at 100 or below, as in the paper."
        ),
    ),
    Paper(
        "LoRA",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "Hu et al.",
        2021,
        "2106.09685",
        letters="Convolutions are adapted, too, and what is adapted is chosen by the names of layers.",
    ),
    Paper(
        "BPE",
        "Neural Machine Translation of Rare Words with Subword Units",
        "Sennrich, Haddow & Birch",
        2016,
        "1508.07909",
        letters=(
            "Of equally frequent pairs the first in the order of Unicode is merged, and a pair that is found once "
            "is not."
        ),
    ),
    Paper(
        "GLU",
        "GLU Variants Improve Transformer",
        "Shazeer",
        2020,
        "2002.05202",
        letters=("With biases, as latent diffusion has it; the paper's have none."),
    ),
    Paper(
        "NeRF",
        "NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis",
        "Mildenhall et al.",
        2020,
        "2003.08934",
        letters=(
            "Coordinates are concatenated to their sines, and the longest wavelength is that of standardised data."
        ),
    ),
    Paper(
        "FID",
        "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        "Heusel et al.",
        2017,
        "1706.08500",
        letters=(
            "Roots are of symmetric matrices alone, so that fewer samples than features need no correction. The "
            "features need not be those of Inception. The standard error is not from the paper."
        ),
    ),
    Paper(
        "KID",
        "Demystifying MMD GANs",
        "Bińkowski, Sutherland, Arbel & Gretton",
        2018,
        "1801.01401",
        letters=("Over all pairs of the sets at once, not a mean over subsets; the interval comes from a jackknife."),
    ),
    Paper(
        "Kynkaanniemi",
        "Improved Precision and Recall Metric for Assessing Generative Models",
        "Kynkäänniemi et al.",
        2019,
        "1904.06991",
        letters=("Its realism score is not computed here. The features are those of the requested measure."),
    ),
    Paper(
        "Naeem",
        "Reliable Fidelity and Diversity Metrics for Generative Models",
        "Naeem et al.",
        2020,
        "2002.09797",
        letters=("The features are those of the requested measure; balls are of real images alone."),
    ),
    Paper(
        "Muon",
        "Muon, an optimizer for hidden layers",
        "Jordan et al.",
        2024,
        letters=(
            "The factor 0.2 sqrt(max(m, n)) is from a later paper (arXiv 2502.16982); convolutions are matrices of "
            "their outputs, and what is not a matrix is trained by AdamW."
        ),
    ),
    Paper(
        "Lavin",
        "Fast Algorithms for Convolutional Neural Networks",
        "Lavin & Gray",
        2015,
        "1509.09308",
        letters=("Only F(2x2, 3x3), with padding 1, on a CPU."),
    ),
)

OTHERS = "Definitions of our own, and of textbooks"
"""Title of the page of all tags of no listed paper."""
