"""Openings, plots and closings of the stories: templates in the markup of `story_grammar`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Beat = Sequence[str]
"""Alternatives for one step of a story."""


@dataclass(frozen=True)
class Plot:
    """The middle of a story, and the moral that follows from it ("... learned that `moral`")."""

    beats: Sequence[Beat]
    moral: str


OPENINGS: Beat = (
    "Once upon a time, there was {hero.a} named {hero}. {hero.He} lived {home} with {hero.his} "
    "{elder}.",
    "Once upon a time, there was {hero.a} named {hero} who lived {home}.",
    "Once upon a time, {hero.a} named {hero} lived {home}.",
    "Once upon a time, {home}, there lived {hero.a} named {hero}.",
    "[Long ago|Many years ago], {hero.a} named {hero} lived {home} with {hero.his} {elder}.",
)
HABITS: Beat = (
    "",
    "{hero.He} [loved|liked] to [play|sing|run|sit and dream] {place.at}.",
    "Every [morning|day|evening], {hero.he} went {place.to} to [play|look at the clouds|listen to "
    "the birds].",
    "{hero.He} was [kind|friendly|good] to everyone, and everyone liked {hero.him}.",
)
MEETING = "{friend.a} named {friend}"
WORRY: Beat = (
    '"[Why are you crying|What is wrong|Why are you so sad]?" {friend.he} asked.',
    '"[Can I help you|What has happened]?" asked {friend}.',
)
MORALS: Beat = (
    "{hero} had learned that {moral}.",
    "That day, {hero} learned that {moral}.",
    "And so {hero} [understood|found out] that {moral}.",
    "",
)
CLOSINGS: Beat = (
    "From that day on, {hero} and {friend} were [the best of friends|always together].",
    "{hero} and {friend} [stayed|remained] friends for the rest of their lives.",
    "{hero} never forgot that day, and neither did {friend}.",
    "{hero} told {hero.his} {elder} [everything|the whole story], and they [smiled|laughed] "
    "[together|for a long time].",
)

LOST_TREASURE = Plot(
    beats=(
        (
            "{hero} had {treasure.a} that {hero.he} [loved more than anything|carried everywhere].",
            "For {hero.his} birthday, {hero} got {treasure.a} from {hero.his} {elder}.",
        ),
        (
            "{time}, {hero.he} took the {treasure.noun} {place.to} and played until the sun was "
            "low.",
            "{time}, {hero} went {place.to} and took the {treasure.noun} with {hero.him}.",
        ),
        (
            "But when it was time to go home, the {treasure.noun} was [gone|nowhere to be seen].",
            "On the way home, {hero.he} saw that the {treasure.noun} was [gone|missing].",
        ),
        (
            "{hero} was so sad that {hero.he} sat down and [cried|began to cry].",
            "{hero} looked everywhere but could not find it, so {hero.he} began to cry.",
        ),
        (
            "{friend.A} named {friend} heard {hero.him} and came closer.",
            "Just then, {friend.a} named {friend} came [along|down] the path.",
        ),
        WORRY,
        ('"I have lost my {treasure}," [said|answered|whispered] {hero}.',),
        (
            '"[Do not worry|Dry your eyes]," said {friend}. "[We will find it together|I will help '
            'you to look for it]."',
        ),
        (
            "They looked [high and low|here and there], and at last {friend} found the "
            "{treasure.noun} {spot}.",
            "They searched [for an hour|until evening], and there it was, {spot}!",
        ),
        (
            "{hero} was so happy that {hero.he} [danced|jumped for joy|laughed out loud].",
            '"Thank you, {friend}!" said {hero}, and {hero.he} hugged {friend.him}.',
        ),
    ),
    moral="a good friend is worth more than any {treasure.noun}",
)
RESCUE = Plot(
    beats=(
        (
            "{time}, {hero} was walking {place.at} when {hero.he} heard a [small|weak|faint] "
            "voice.",
            "{time}, as {hero} walked {place.at}, a voice called from far away.",
        ),
        ('"[Help! Please help me|Is anybody there? I need help]!" [cried|called|said] the voice.',),
        (
            "{hero} ran as fast as {hero.he} could and found " + MEETING + ".",
            "{hero} followed the sound, and there was " + MEETING + ".",
        ),
        ("{trouble.problem}",),
        (
            '"[Do not be afraid|Stay calm]," said {hero}. "I will [help you|get you out]."',
            '"I am here now," said {hero}. "[Be brave|Everything will be fine]."',
        ),
        ("{trouble.remedy}",),
        (
            '"[Thank you|You are very kind]," said {friend}. "[How can I thank you|What can I do '
            'for you]?"',
            '"You saved me!" said {friend}. "[What can I give you|How can I thank you]?"',
        ),
        (
            '"[Be my friend|Come and play with me]," said {hero}. "[I am often alone|That is all I '
            'wish for]."',
        ),
        (
            "{friend} [smiled|was happy], and they [shared some bread and cheese|played until the "
            "stars came out|walked home side by side].",
        ),
    ),
    moral="[whoever helps others is never alone|a kind deed can win a friend]",
)
STORM = Plot(
    beats=(
        ("{time}, {hero} and {hero.his} friend {friend} were playing {place.at}.",),
        (
            "[Soon|After a while|Suddenly], the sky turned [dark|black] and the wind began to "
            "[blow|howl].",
            "[Suddenly|Then] big drops of rain fell, and thunder rolled over the {place.noun}.",
        ),
        (
            '"We must find a dry place!" [cried|shouted|called] {hero}.',
            '"[Quick|Hurry], follow me!" [cried|shouted|called] {hero}.',
        ),
        (
            "They ran through the rain and hid [in a small cave|in an old barn|inside a hollow "
            "tree].",
        ),
        (
            "{friend} was afraid of the storm, so {hero} [sang a song|told {friend.him} a story "
            "about a brave king|sat close to {friend.him} and counted the drops].",
            "{friend} was [cold|wet and cold], so {hero} gave {friend.him} [a warm coat|a dry "
            "blanket] and [sang a song|told a funny story].",
        ),
        ("[Little by little|Soon], {friend} forgot {friend.his} fear and began to [smile|laugh].",),
        (
            "When the rain stopped, a [bright|beautiful|wide] rainbow stood over the {place.noun}.",
            "At last the clouds went away, and the sun shone [again|on the wet ground].",
        ),
        (
            '"[Look how beautiful it is|How bright the world is now]!" said {friend}. "I am glad '
            'that we were together."',
        ),
    ),
    moral="[no storm is so bad when a friend is near|after every rain the sun comes back]",
)
SHARING = Plot(
    beats=(
        (
            "{time}, {hero.his} {elder} baked {food.a} and gave it to {hero.him}.",
            "{time}, {hero} baked {food.a} with {hero.his} {elder}.",
        ),
        (
            "{hero} put the {food.noun} in a basket and [walked|went] {place.to}.",
            "{hero} wanted to eat the {food.noun} {place.at}, because it was so [quiet|lovely] "
            "there.",
        ),
        (
            "There {hero.he} met " + MEETING + ", who looked [tired|sad|cold] and hungry.",
            "On the way, {hero.he} met " + MEETING + ", who looked [tired|sad|cold] and hungry.",
        ),
        (
            '"I have not eaten [all day|since yesterday]," said {friend}, "because [I lost my way'
            '|I gave my bread to the birds|my bag fell into the water]."',
        ),
        (
            "The {food.noun} was small, but {hero} [broke it in two|cut it in half] and gave "
            "{friend.him} the bigger half.",
            "{hero} thought for a moment. Then {hero.he} gave {friend.him} half of the "
            "{food.noun}.",
        ),
        (
            "They sat in the [sun|shade] and ate every crumb.",
            "They ate and [talked|laughed] until the {food.noun} was gone.",
        ),
        (
            "The next [day|morning], {friend} knocked at the door with [a jar of honey|a basket of "
            "apples|a bunch of flowers|a bag of nuts].",
        ),
        (
            '"This is for you," {friend.he} said, "because you were [kind|good] to me."',
            '"You shared with me," said {friend}, "so now I want to share with you."',
        ),
    ),
    moral="[food tastes better when it is shared|whoever gives will also receive]",
)
PRACTICE = Plot(
    beats=(
        (
            "{hero} wanted to learn to {skill.do}, but it was [very|so] hard.",
            "More than anything, {hero} wanted to {skill.do}.",
        ),
        (
            "The first time, {hero.he} {skill.failed}.",
            "{time}, {hero.he} tried it for the first time, but {hero.he} {skill.failed}.",
        ),
        (
            '"I will never learn it," {hero.he} said, and a tear ran down {hero.his} face.',
            '"It is too hard for me," {hero.he} said [sadly|with a sigh].',
        ),
        (
            "But {hero.his} friend {friend} [smiled|did not laugh].",
            "{hero.His} friend {friend} sat down beside {hero.him}.",
        ),
        (
            '"[Nobody can do everything at once|Everyone has to begin somewhere]," said {friend}. '
            '"Try again [tomorrow|slowly], and I will stay with you."',
        ),
        (
            "So they practised every [day|morning|evening], in the sun and in the rain.",
            "So {hero} tried again and again, and {friend} was always there.",
        ),
        (
            "Sometimes {hero.he} wanted to give up, but {friend} always had a kind word for "
            "{hero.him}.",
            "",
        ),
        ("Then, one [fine|bright|quiet] morning, {hero} {skill.succeeded}.",),
        (
            '"You did it!" [cried|shouted|called] {friend}.',
            '"I [knew|always knew] that you could do it!" said {friend}.',
        ),
        ("{hero} was [very|so] proud, because {hero.he} had not given up.",),
    ),
    moral="[you can learn almost anything if you do not give up|small steps lead far]",
)
QUARREL = Plot(
    beats=(
        (
            "{time}, {hero} and {hero.his} friend {friend} found {toy.a} {place.at}.",
            "{time}, {hero} and {hero.his} friend {friend} saw {toy.a} lying {spot}.",
        ),
        (
            '"I saw it first!" said {hero}. "No, it is mine!" said {friend}.',
            '"It is mine!" [cried|shouted] {hero}. "No, I saw it first!" said {friend}.',
        ),
        (
            "They pulled and pulled until they both fell [into the mud|down].",
            "They were so angry that they did not [speak|look at each other] any more.",
        ),
        ("{friend} went home without a word, and {hero} kept the {toy.noun}.",),
        (
            "But it was no fun to play alone, and [soon|by evening] {hero} felt [lonely|sorry].",
            "{hero} looked at the {toy}, but {hero.he} was not happy, because {hero.he} was alone.",
        ),
        ("That evening, {hero} [knocked at {friend}'s door|went to see {friend}].",),
        (
            '"I am sorry," {hero.he} said. "[A friend is better than {toy.a}|I would rather have '
            'you than {toy.a}]."',
        ),
        (
            '"I am sorry too," said {friend}. "[Let us share it|We can take turns]."',
            '{friend} smiled. "[Let us share it|We can play with it together]," {friend.he} said.',
        ),
        ("After that, the {toy.noun} belonged to both of them, and it was [twice as|much more] fun "
         "[to play|to play with it].",),
    ),
    moral="[sharing is better than winning|it is never too late to say sorry]",
)  # fmt: skip
DISCOVERY = Plot(
    beats=(
        (
            "{time}, {hero} was [walking|playing] {place.at} with {hero.his} friend {friend}.",
            "{time}, {hero} and {hero.his} friend {friend} went {place.to}.",
        ),
        (
            "Something was lying {spot}. It was {find.thing}!",
            "There, {spot}, {friend} found {find.thing}.",
        ),
        (
            '"What can it be?" asked {friend}. "[I do not know|I have never seen one like it]," '
            "said {hero}.",
            '"Where does it come from?" asked {hero}. "[I do not know|Nobody knows]," said '
            "{friend}.",
        ),
        (
            "So they took the {find.noun} to {hero}'s {elder}, who [knew many things|was old and "
            "wise].",
            "They carried the {find.noun} home and showed it to {hero}'s {elder}.",
        ),
        (
            'The {elder} looked at it [for a long time|and smiled]. "{find.answer}"',
            'The {elder} [nodded|laughed|was surprised]. "{find.answer}"',
        ),
        ("{find.outcome}",),
        (
            "It was the most [wonderful|beautiful] thing that {hero} and {friend} had ever known.",
            "{hero} and {friend} were so [happy|surprised] that they could not speak.",
        ),
    ),
    moral="[the world is full of wonders|whoever asks will find an answer]",
)
NIGHT_NOISE = Plot(
    beats=(
        ("{hero} was afraid of [the dark|the night].",),
        (
            "One [dark|cold|windy] night, a strange [sound|noise] woke {hero.him}.",
            "One [dark|cold|windy] night, {hero.he} heard a knock at the [window|door].",
        ),
        ('"Is it a [monster|ghost|wolf|giant]?" {hero.he} whispered and hid under the blanket.',),
        (
            "But {hero} wanted to be brave, so {hero.he} lit a [lantern|candle] and opened the "
            "door.",
            "Then {hero} took a deep breath, lit a [lantern|candle] and opened the door.",
        ),
        (
            "Outside stood " + MEETING + ", wet and cold.",
            "It was only " + MEETING + ", shaking from the cold.",
        ),
        (
            '"I have lost my way," said {friend}, "[and I saw the light in your window|and your '
            'house was the only one that I could find]."',
        ),
        (
            '"Come in and [sit by the fire|get warm]," said {hero}.',
            '{hero} [laughed|smiled]. "Come in, you must be cold," {hero.he} said.',
        ),
        (
            "They drank [hot milk|warm tea with honey] and told each other stories until the sun "
            "came up.",
            "They ate [warm soup|bread with honey] and talked until morning.",
        ),
        ("After that night, {hero} was not afraid [any more|of the dark any more].",),
    ),
    moral="[things look worse in the dark than they are|a noise in the night may be a friend]",
)
BIRTHDAY = Plot(
    beats=(
        (
            "{hero.His} friend {friend} had a birthday, but {hero} had no money for a gift.",
            "{hero} wanted to give {hero.his} friend {friend} a gift, but {hero.he} had no money.",
        ),
        (
            '"What shall I do?" {hero.he} asked {hero.his} {elder}. "[Make something '
            'yourself|Give something that you have made]," said the {elder}.',
        ),
        ("So {hero} {present.making}.",),
        (
            "In the end {hero.he} had made {present.a}.",
            "At last it was ready. It was {present.a}.",
        ),
        (
            "On the day of the party, there were many big [boxes|gifts], and {hero} was afraid "
            "that {hero.his} gift was too small.",
            "When {hero} saw all the [big|shiny] gifts of the others, {hero.he} felt [shy|small].",
        ),
        (
            "But when {friend} saw the {present}, {friend.his} eyes [shone|were bright].",
            "But {friend} looked at the {present} and [smiled|could not look away].",
        ),
        (
            '"You made it yourself," said {friend}. "[That is why I love it|It is the best gift of '
            'all]."',
        ),
        ("{hero} was so happy that {hero.he} [danced all evening|could not stop smiling].",),
    ),
    moral="[the best gifts come from the heart|love matters more than money]",
)
LOST_WAY = Plot(
    beats=(
        (
            "{time}, {hero} followed a [white|yellow|blue] butterfly deep into the woods.",
            "{time}, {hero} went to look for [berries|mushrooms|nuts] and walked far into the "
            "woods.",
        ),
        (
            "When {hero.he} turned around, the path was gone, and all the trees looked the same.",
            "{hero.He} did not see how late it was until the sun went down.",
        ),
        (
            '"How will I ever find my way home?" {hero.he} [whispered|asked].',
            "{hero} called for help, but only the wind answered.",
        ),
        ("Then {friend.a} stepped out from behind a tree.",),
        (
            '"I am {friend}," {friend.he} said. "I know [every path here|these woods well]."',
            '"My name is {friend}," {friend.he} said. "[Do not be afraid|I will take you home]."',
        ),
        (
            "Together they followed [the stream|the stars|the light of the moon] until they saw a "
            "[light|window] far away.",
        ),
        ("{hero}'s {elder} was waiting at the door and [hugged {hero.him}|ran to meet them].",),
        (
            '"I was so worried about you," said the {elder}. "[Thank you|Bless you], {friend}."',
            '"There you are at last!" said the {elder}. "[Come in|Sit down], both of you, and eat '
            'some soup."',
        ),
        ("{hero} promised [never to go so far alone again|to be more careful].",),
    ),
    moral="[it is good to know the way back|even in the dark there is somebody who can help]",
)
PLOTS = (
    LOST_TREASURE,
    RESCUE,
    STORM,
    SHARING,
    PRACTICE,
    QUARREL,
    DISCOVERY,
    NIGHT_NOISE,
    BIRTHDAY,
    LOST_WAY,
)
