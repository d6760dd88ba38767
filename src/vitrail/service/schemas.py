"""The JSON of requests and responses. Field descriptions and examples are those of /openapi.json."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

_SCORES: list[JsonValue] = [{"label": "cat", "score": 0.97}, {"label": "dog", "score": 0.03}]


class ClassScore(BaseModel):
    label: str
    score: float = Field(ge=0, le=1, description="Probability.")


class Heatmap(BaseModel):
    """Which pixels decided, as in `vitrail explain`."""

    method: str
    target: str = Field(description="The class that is explained.")
    class_specific: bool = Field(description="Whether the map depends on the class.")
    png: str = Field(
        description="RGBA picture to lay over the upright image, PNG in base64.",
        json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"},
    )
    width: int = Field(description="Of the upright image, pixels.")
    height: int


class PredictionBody(BaseModel):
    """The most probable classes of an image."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"label": "cat", "score": 0.97, "unsure": False, "top": _SCORES}]}
    )

    label: str
    score: float = Field(ge=0, le=1, description="Probability of the label.")
    unsure: bool = Field(description="Whether no class has a probability of 0.5 or more.")
    top: list[ClassScore] = Field(description="The most probable classes, the first one first.")
    heatmap: Heatmap | None = Field(default=None, description="With ?explain= only.")


class BatchItem(BaseModel):
    """A prediction, or the error of one image among several."""

    name: str | None = Field(default=None, description="The file name of the form's field, if it has one.")
    prediction: PredictionBody | None = None
    error: str | None = None


class BatchBody(BaseModel):
    images: list[BatchItem] = Field(description="In the order of the request.")


class Labels(BaseModel):
    labels: list[str] = Field(description="Class names by index.")


class ModelBody(BaseModel):
    """What the service predicts with."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    architecture: str
    runtime: str
    classes: int
    preprocess: dict[str, Any] = Field(description="Size, mean, std, interpolation, crop fraction and crop mode.")
    explain_methods: list[str] = Field(description="Values of ?explain=; empty for an exported model.")
    max_body: int = Field(description="Largest request, bytes.")
    max_files: int = Field(description="Most files of a batch request.")
    notes: dict[str, Any] = Field(description="What is known of training: data, figures, source, licence.")


class Health(BaseModel):
    status: str = Field(examples=["ok"])


class ErrorBody(BaseModel):
    error: str = Field(description="What is wrong, in one line.")


# The Open Inference Protocol, version 2.


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Liveness(BaseModel):
    live: bool


class Readiness(BaseModel):
    ready: bool


class ModelReadiness(BaseModel):
    name: str
    ready: bool


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata] = Field(description="Each request has one of them.")
    outputs: list[TensorMetadata]


Size = Annotated[int, Field(ge=0, le=1 << 31)]


class InputTensor(BaseModel):
    name: str
    shape: list[Size]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = Field(default=None, description="Values, flat or nested; absent if sent as binary data.")


class RequestedOutput(BaseModel):
    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(BaseModel):
    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] = Field(default_factory=list)


class OutputTensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]

    model_config = ConfigDict(protected_namespaces=())
